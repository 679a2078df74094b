"""Padding, kv caches and generation of patched models, over every registered variant; none is named."""

import pytest
import torch
from transformers import DynamicCache

from patchattn.core.kv_caches import cache_argument, find_cache

from .behaviour import Case, close, decoded, on, positions, text
from .families import FAMILIES, LENGTH, of_kind, outputs

pytestmark = pytest.mark.usefixtures("toys")
CAUSAL = [*of_kind("decoder"), "llava", "qwen2_5_vl"]
TOKENS, CHUNKS, PREFILL = [1] * LENGTH, [4, 3, 1, 1], [LENGTH - 1, 1]
CALLS = [
    pytest.param(TOKENS, "dynamic", id="tokens-dynamic"),
    pytest.param(CHUNKS, "static", id="chunks-static"),
    pytest.param(TOKENS, "static", id="tokens-static", marks=pytest.mark.full),
    pytest.param(CHUNKS, "dynamic", id="chunks-dynamic", marks=pytest.mark.full),
    pytest.param(PREFILL, "dynamic", id="prefill-dynamic", marks=pytest.mark.full),
    pytest.param(PREFILL, "static", id="prefill-static", marks=pytest.mark.full),
]


@pytest.mark.parametrize("side", ["left", "right"])
@on([*CAUSAL, *of_kind("encoder")])
def test_padding_changes_no_real_token(family: str, case: Case, side: str) -> None:
    model = FAMILIES[family].make_exact()
    # These make positions of their own from the tokens or the mask, where they have absolute ones at all. ModernBERT
    # needs none, but rounds angles to float32, by up to 3e-8 of what it gives elsewhere.
    takes_positions = family not in ("roberta", "opt", "distilbert")
    if side == "left" and family == "distilbert":
        pytest.skip("DistilBERT has absolute positions and lets nobody shift them")
    case.patch(model)
    tokens, short = text(), LENGTH - 3
    mask = torch.ones_like(tokens)
    real = slice(3, None) if side == "left" else slice(0, short)
    mask[1] = 0
    mask[1, real] = 1
    padded = tokens * mask
    extra = {"position_ids": positions(mask)} if takes_positions else {}
    if family == "qwen2_5_vl":
        extra = {"position_ids": positions(mask).expand(3, -1, -1)}  # time, height and width
    together = outputs(model, input_ids=padded, attention_mask=mask, **extra)[0]
    close(together[:1], outputs(model, input_ids=tokens[:1])[0])
    close(together[1:, real], outputs(model, input_ids=padded[1:, real])[0])


@on(["t5", "bart"])
def test_padding_of_the_encoder_changes_no_decoder_token(family: str, case: Case) -> None:
    model, inputs = FAMILIES[family].make_exact(), FAMILIES[family].inputs()
    case.patch(model)
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, 6:] = 0
    together = outputs(model, **inputs, attention_mask=mask)[0]
    alone = {"input_ids": inputs["input_ids"][1:, :6], "decoder_input_ids": inputs["decoder_input_ids"][1:]}
    close(together[1:], outputs(model, **alone)[0])


@pytest.mark.parametrize(("chunks", "kind"), CALLS)
@on(CAUSAL)
def test_cached_decoding_equals_one_forward(family: str, case: Case, chunks: list[int], kind: str) -> None:
    model, tokens = FAMILIES[family].make_exact(), text()
    case.patch(model)
    known = case.info.capabilities
    takes_static = "static_cache" in known or "causal" not in known  # those act in encoders alone
    if kind == "static" and not takes_static:
        with pytest.raises(NotImplementedError, match="static"):
            decoded(model, tokens, chunks, kind)
        return
    steps = decoded(model, tokens, chunks, kind)
    if case.looks_ahead:  # the first call is a forward, the others depend on the calls before, not on the cache's kind
        close(steps[:, : chunks[0]], outputs(model, input_ids=tokens[:, : chunks[0]])[0])
        if takes_static:
            close(steps, decoded(model, tokens, chunks, {"static": "dynamic", "dynamic": "static"}[kind]))
    else:
        close(steps, outputs(model, input_ids=tokens)[0])


@on(["llama", "qwen3", "gpt2", "opt", "mistral"])
def test_left_padded_cached_decoding_equals_unpadded(family: str, case: Case) -> None:
    model, tokens = FAMILIES[family].make_exact(), text()
    case.patch(model)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    cache, parts, done = DynamicCache(config=model.config), [], 0
    for size in (5, 1, 2, 1):
        chunk = slice(done, done + size)
        done += size
        parts.append(
            outputs(
                model,
                input_ids=tokens[:, chunk],
                attention_mask=mask[:, :done],
                position_ids=positions(mask)[:, chunk],
                **cache_argument(model, cache),
            )[0]
        )
    together = torch.cat(parts, dim=1)
    if case.looks_ahead:
        close(together[:1], decoded(model, tokens[:1], [5, 1, 2, 1]))
        close(together[1:, 3:], decoded(model, tokens[1:, 3:], [2, 1, 2, 1]))
    else:
        close(together[:1], outputs(model, input_ids=tokens[:1])[0])
        close(together[1:, 3:], outputs(model, input_ids=tokens[1:, 3:])[0])


@on(of_kind("encoder_decoder"))
def test_cached_decoding_of_an_encoder_decoder_equals_one_forward(family: str, case: Case) -> None:
    model, inputs = FAMILIES[family].make_exact(), FAMILIES[family].inputs()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    case.patch(model)
    full = outputs(model, **inputs)[0]
    if case.looks_ahead:  # only the first call is a forward
        full = outputs(model, **{**inputs, "decoder_input_ids": inputs["decoder_input_ids"][:, :2]})[0]
    decoder, parts, past, encoded = inputs.pop("decoder_input_ids"), [], None, None
    for chunk in decoder.split([2, 1, 2, 1], dim=1):
        with torch.no_grad():
            given = inputs if encoded is None else {"encoder_outputs": (encoded,)}
            step = model(**given, decoder_input_ids=chunk, **cache_argument(model, past), use_cache=True)
        past, encoded = find_cache(step.values()), step.encoder_last_hidden_state
        parts.append(step.logits)
    close(torch.cat(parts, dim=1)[:, : full.shape[1]], full)


@on(["llama", "gpt2", "t5"], first=True, papers=1)
def test_generation_with_beams_static_cache_and_padding(family: str, case: Case) -> None:
    model, tokens = FAMILIES[family].make_exact(), text(6)
    case.patch(model)
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    given = {"input_ids": tokens * mask, "attention_mask": mask}
    for beams in (1, 3):
        cached = model.generate(**given, **settings, num_beams=beams)
        if case.looks_ahead:
            alone = model.generate(tokens[1:, 2:], **settings, num_beams=beams)
            assert torch.equal(cached[1, -5:], alone[0, -5:])
        else:
            assert torch.equal(cached, model.generate(**given, **settings, num_beams=beams, use_cache=False))
    greedy = model.generate(**given, **settings)
    alone = model.generate(tokens[1:, 2:], **settings)
    assert torch.equal(greedy[1, -5:], alone[0, -5:])
    if family != "t5" and "static_cache" in case.info.capabilities:
        static = model.generate(**given, **settings, cache_implementation="static", disable_compile=True)
        assert torch.equal(greedy, static)
