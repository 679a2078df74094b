"""Ranks under sliding windows: what is padding is told by the model's mask of tokens, not taken from what is hidden."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.integrations import flash_attention

import patchattn
from patchattn.core.given import read_mask
from patchattn.core.kv_caches import cache_argument
from patchattn.core.ranks import Told
from patchattn_kernels import sink_and_recent

from .families import FAMILIES, VOCABULARY
from .test_own_keys import looking
from .test_seam import flash_in_torch

PADDING, WINDOW, PARTS = 3, 4, (7, 3, 1, 1, 2, 1)
LENGTH = sum(PARTS)
# The first keys of a text and its last ones, of which a window of 4 keys shows both as long as it holds the first.
SINKS, RECENT = 7, 2
TOKENS = torch.randint(5, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(7))
SHOWN = torch.ones(2, LENGTH, dtype=torch.long)
SHOWN[0, :PADDING] = 0
NUMBERS = (SHOWN.cumsum(-1) - 1).clamp(min=0)
VARIANTS = {
    "streaming": {"sinks": SINKS, "recent": RECENT},
    "power": {"block": 2, "local": 1},
    "heads": {"gain": 0.0, "heads": [[0, 1], [1, 2]], "rows": "marked", "tokens": (2, 7, 9, 10)},
}
CACHES = {
    "dynamic": lambda model: DynamicCache(),
    "sliding": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(model.config, max_cache_len=LENGTH + 2),
}


def loops(call: Any, first: int, column: int) -> np.ndarray:
    """`(B, H, Tq, D)` in float64: sinks and recent keys of a text in a window, whose first query is token `first` and
    whose first key is token `column`."""
    query, key, value = (tensor.double().numpy() for tensor in (call.query, call.key, call.value))
    output, heads = np.zeros_like(query), query.shape[1]
    real = SHOWN.bool().numpy()
    for b, h, i in np.ndindex(*query.shape[:3]):
        own, group = first + i, h // (heads // key.shape[1])
        text = [j for j in range(own + 1) if real[b, j]]
        kept = [j for n, j in enumerate(text) if n < SINKS or n >= len(text) - RECENT]
        places = [j - column for j in kept if own - j < WINDOW]
        if places:
            powers = np.exp(key[b, group, places] @ query[b, h, i] * call.scaling)
            output[b, h, i] = powers @ value[b, group, places] / powers.sum()
    return output


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flash_attention_2"])
def test_ranks_and_sinks_of_a_left_padded_row(implementation: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill, a chunk, decoding beyond the window, a second turn: ranks by counting tokens, attention by loops."""
    monkeypatch.setattr(flash_attention, "_flash_attention_forward", flash_in_torch)
    model = FAMILIES["mistral"].make()
    for module in model.modules():
        if implementation == "flash_attention_2" and hasattr(module, "config"):
            module.config._attn_implementation_internal = implementation
    if implementation != "flash_attention_2":
        model.set_attn_implementation(implementation)
    if kind == "static" and implementation == "flash_attention_2":
        pytest.skip("transformers gives flash attention no mask of a static cache that is not full")
    cache, done = CACHES[kind](model), 0
    keep = sink_and_recent(SINKS, RECENT, 4)
    rank = SHOWN.cumsum(-1)
    with torch.no_grad(), looking(True) as (name, calls), patchattn.patched(model, name):
        for rows in PARTS:
            first, done = done, done + rows
            words = {"attention_mask": SHOWN[:, :done], "position_ids": NUMBERS[:, first:done]}
            model(TOKENS[:, first:done], **words, **cache_argument(model, cache))
            call, column = calls[-1], calls[-1].mask.dropped
            last = min(call.key.shape[2], done - column)
            assert call.mask.row_order().expand(2, -1).tolist() == rank[:, first:done].tolist()
            order = call.mask.key_order().expand(2, -1, -1)[:, 0, :last]
            assert order.tolist() == rank[:, column : column + last].tolist()
            real = call.mask.real_keys().expand(2, -1, -1)[:, 0, :last]
            assert real.tolist() == SHOWN.bool()[:, column : column + last].tolist()
            wanted, mine = loops(call, first, column), SHOWN[:, first:done].bool()
            seen = call.seeing(keep).mask.seen().expand(2, 4, -1, -1)
            for b, h, i in np.ndindex(*wanted.shape[:3]):
                if mine[b, i]:
                    places = seen[b, h, i].nonzero().squeeze(-1)
                    powers = torch.exp(
                        call.key[b, h // 2, places].double() @ call.query[b, h, i].double() * call.scaling
                    )
                    got = powers @ call.value[b, h // 2, places].double() / powers.sum()
                    np.testing.assert_allclose(got.numpy(), wanted[b, h, i], rtol=1e-9, atol=1e-9)
    assert done - WINDOW > SINKS


def parts_of(model: nn.Module, cache: Any, rows: int | None = None) -> torch.Tensor:
    """Logits of both rows in parts; or those of one row without its padding, in one forward."""
    if rows is not None:
        return model(TOKENS[rows : rows + 1, int(NUMBERS[rows].eq(0).sum()) - 1 :], use_cache=False).logits[0]
    found, done = [], 0
    for length in PARTS:
        first, done = done, done + length
        words = {"attention_mask": SHOWN[:, :done], "position_ids": NUMBERS[:, first:done]}
        found.append(model(TOKENS[:, first:done], **words, **cache_argument(model, cache)).logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_a_padded_row_is_the_row_alone(family: str, kind: str, variant: str) -> None:
    model = FAMILIES[family].make_exact()
    with torch.no_grad(), patchattn.patched(model, variant, **VARIANTS[variant]):
        got = parts_of(model, CACHES[kind](model))
        for b, padding in enumerate((PADDING, 0)):
            torch.testing.assert_close(got[b, padding:], parts_of(model, None, b), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_generation_beyond_the_window(family: str, beams: int) -> None:
    model = FAMILIES[family].make_exact()
    words = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    words |= {"return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad(), patchattn.patched(model, "streaming", sinks=SINKS, recent=1):
        both = model.generate(TOKENS[:, :8], attention_mask=SHOWN[:, :8], **words)
        for b, padding in enumerate((PADDING, 0)):
            alone = model.generate(TOKENS[b : b + 1, padding:8], **words)
            assert both.sequences[b, 8:].tolist() == alone.sequences[0, 8 - padding :].tolist()
            for step, logits in zip(both.logits, alone.logits, strict=True):
                got = step.view(2, beams, -1)[b]
                torch.testing.assert_close(got.sort(0).values, logits.view(beams, -1).sort(0).values)


def test_what_nobody_told_is_refused() -> None:
    """A mask of all pairs, and those that generate makes for a static cache: only once keys are hidden from all."""
    model = FAMILIES["mistral"].make()
    pairs = torch.ones(9, 9).bool().tril() & ~torch.ones(9, 9).bool().tril(-WINDOW)
    with torch.no_grad(), patchattn.patched(model, "streaming", sinks=2, recent=2):
        for cache, kept in ((DynamicCache(), 9), (DynamicCache(config=model.config), 6)):
            model(TOKENS[:1, :6], attention_mask=pairs[None, None, :6, :6], **cache_argument(model, cache))
            with pytest.raises(NotImplementedError, match="nobody told which of them were padding"):
                model(TOKENS[:1, 6:9], attention_mask=pairs[None, None, 6:, 9 - kept :], **cache_argument(model, cache))
        with pytest.raises(NotImplementedError, match="masks that are made already"):
            model.generate(TOKENS[:, :3], max_new_tokens=8, cache_implementation="static", disable_compile=True)
    with torch.no_grad(), patchattn.patched(model, "streaming", sinks=0, recent=2):  # differences are enough
        model.generate(TOKENS[:, :3], max_new_tokens=8, cache_implementation="static", disable_compile=True)


def test_a_mask_of_tokens_that_does_not_fit_is_not_believed() -> None:
    sizes: dict[str, Any] = {"batch": 2, "heads": 4, "queries": 1, "keys": 9, "device": torch.device("cpu")}
    how: dict[str, Any] = {"form": "bool", "meaning": "causal", "window": 4, "own": 8}
    pairs = torch.arange(9).ge(5).expand(2, 1, 1, -1)
    known = read_mask(pairs, told=Told(SHOWN[:, :9]), **how, **sizes)
    assert known.row_order().tolist() == [[6], [9]]
    for text in (SHOWN[:, :8], SHOWN[:1, :9].repeat(3, 1), "unknown"):
        mask = read_mask(pairs, told=Told(text), **how, **sizes)
        for ask in (mask.key_order, mask.row_order, mask.key_places, mask.row_places, mask.real_keys):
            with pytest.raises(NotImplementedError, match="nobody told"):
                ask()


def test_chunked_attention_counts_what_its_chunks_hide() -> None:
    """Llama 4's chunks are no texts of their own, and what they hide from a token came before it all the same."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}
    layers = {"num_hidden_layers": 1, "layer_types": ["chunked_attention"], "moe_layers": [], "no_rope_layers": [1]}
    more = {"attention_chunk_size": 4, "intermediate_size": 32, "intermediate_size_mlp": 32, "pad_token_id": 0}
    model = tf.Llama4ForCausalLM(tf.Llama4TextConfig(**sizes, **layers, **more)).eval()
    for words in ({}, {"attention_mask": SHOWN}):
        rank = SHOWN.cumsum(-1) if words else torch.arange(1, LENGTH + 1).expand(2, -1)
        with torch.no_grad(), looking(True) as (name, calls), patchattn.patched(model, name):
            for cache in (DynamicCache(), DynamicCache(config=model.config)):
                for first, done in ((0, 7), (7, 10), (10, 11)):
                    shown = {key: mask[:, :done] for key, mask in words.items()}
                    model(TOKENS[:, first:done], **shown, **cache_argument(model, cache))
                    mask = calls[-1].mask
                    assert mask.row_order().expand(2, -1).tolist() == rank[:, first:done].tolist()
                    assert mask.row_places().expand(2, -1).tolist() == rank[:, first:done].tolist()
                    assert mask.key_places()[:, 0].expand(2, -1).tolist() == rank[:, mask.dropped : done].tolist()
