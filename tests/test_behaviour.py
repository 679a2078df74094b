"""The invariants of a patched model, over every registered variant and every family. Nothing here names a variant."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DynamicCache, StaticCache

import patchattn
from patchattn.kv_caches import cache_argument, find_cache

from .behaviour import Case, assert_same, cases, neutral_cases, snapshot, variant_parameters
from .families import FAMILIES, LENGTH, VOCABULARY, of_kind, outputs

EVERY_CASE = pytest.mark.parametrize("case", cases(), ids=str)
EVERY_FAMILY = pytest.mark.parametrize("family", list(FAMILIES))
CAUSAL = [*of_kind("decoder"), "llava", "qwen2_5_vl"]
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}  # of what differs by the order of sums alone


def close(left: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=TOLERANCES[left.dtype], atol=TOLERANCES[left.dtype])


def text(length: int = LENGTH, rows: int = 2) -> torch.Tensor:
    return torch.randint(3, VOCABULARY - 4, (rows, length), generator=torch.Generator().manual_seed(3))


def looks_ahead(case: Case) -> bool:
    """Whether rows depend on later ones of the same call, so that decoding is not one forward over all tokens."""
    return patchattn.variant_info(case.variant).looks_ahead


def decoded(model: torch.nn.Module, tokens: torch.Tensor, sizes: list[int], kind: str = "dynamic") -> torch.Tensor:
    """Outputs of calls of these sizes, one after the other on one cache."""
    config = model.config.get_text_config()
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=16)
    parts = tokens.split(sizes, dim=1)
    return torch.cat(
        [outputs(model, input_ids=part, **cache_argument(model, cache), use_cache=True)[0] for part in parts], dim=1
    )


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@EVERY_FAMILY
@pytest.mark.parametrize("case", neutral_cases(), ids=str)
def test_neutral_settings_change_nothing(family: str, case: Case) -> None:
    model, inputs = FAMILIES[family].make(), FAMILIES[family].inputs()
    expected = outputs(model, **inputs)
    case.patch(model, live=False)
    for left, right in zip(expected, outputs(model, **inputs), strict=True):
        assert torch.equal(left, right)


@EVERY_FAMILY
@EVERY_CASE
def test_a_patch_changes_the_output_and_unpatching_restores_every_bit(family: str, case: Case) -> None:
    model, inputs = FAMILIES[family].make(), FAMILIES[family].inputs()
    expected = outputs(model, **inputs)
    before = snapshot(model)  # after a forward: transformers installs hooks of its own in the first
    case.patch(model)
    changed = outputs(model, **inputs)
    assert max(float((left - right).abs().max()) for left, right in zip(expected, changed, strict=True)) > 1e-4
    assert all(bool(tensor.isfinite().all()) for tensor in changed)
    patchattn.unpatch_model(model)
    assert_same(before, snapshot(model))
    for left, right in zip(expected, outputs(model, **inputs), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", [*CAUSAL, *of_kind("encoder")])
@EVERY_CASE
def test_padding_changes_no_real_token(family: str, case: Case, side: str) -> None:
    model = FAMILIES[family].make_exact()
    # These make positions of their own from the tokens or the mask, where they have absolute ones at all.
    takes_positions = family not in ("qwen2_5_vl", "roberta", "opt", "modernbert", "distilbert")
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
    together = outputs(model, input_ids=padded, attention_mask=mask, **extra)[0]
    close(together[:1], outputs(model, input_ids=tokens[:1])[0])
    close(together[1:, real], outputs(model, input_ids=padded[1:, real])[0])


@pytest.mark.parametrize("family", ["t5", "bart"])
@EVERY_CASE
def test_padding_of_the_encoder_changes_no_decoder_token(family: str, case: Case) -> None:
    model, inputs = FAMILIES[family].make_exact(), FAMILIES[family].inputs()
    case.patch(model)
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, 6:] = 0
    together = outputs(model, **inputs, attention_mask=mask)[0]
    alone = {"input_ids": inputs["input_ids"][1:, :6], "decoder_input_ids": inputs["decoder_input_ids"][1:]}
    close(together[1:], outputs(model, **alone)[0])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("chunks", [[1] * LENGTH, [4, 3, 1, 1], [LENGTH - 1, 1]], ids=["tokens", "chunks", "prefill"])
@pytest.mark.parametrize("family", CAUSAL)
@EVERY_CASE
def test_cached_decoding_equals_one_forward(family: str, case: Case, chunks: list[int], kind: str) -> None:
    model, tokens = FAMILIES[family].make_exact(), text()
    case.patch(model)
    steps = decoded(model, tokens, chunks, kind)
    if looks_ahead(case):  # the first call is a forward, the others depend on the calls before, not on the cache's kind
        close(steps[:, : chunks[0]], outputs(model, input_ids=tokens[:, : chunks[0]])[0])
        close(steps, decoded(model, tokens, chunks, {"static": "dynamic", "dynamic": "static"}[kind]))
    else:
        close(steps, outputs(model, input_ids=tokens)[0])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "opt", "mistral"])
@EVERY_CASE
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
    if looks_ahead(case):
        close(together[:1], decoded(model, tokens[:1], [5, 1, 2, 1]))
        close(together[1:, 3:], decoded(model, tokens[1:, 3:], [2, 1, 2, 1]))
    else:
        close(together[:1], outputs(model, input_ids=tokens[:1])[0])
        close(together[1:, 3:], outputs(model, input_ids=tokens[1:, 3:])[0])


@pytest.mark.parametrize("family", of_kind("encoder_decoder"))
@EVERY_CASE
def test_cached_decoding_of_an_encoder_decoder_equals_one_forward(family: str, case: Case) -> None:
    model, inputs = FAMILIES[family].make_exact(), FAMILIES[family].inputs()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    case.patch(model)
    full = outputs(model, **inputs)[0]
    decoder, parts, past, encoded = inputs.pop("decoder_input_ids"), [], None, None
    for chunk in decoder.split([2, 1, 2, 1], dim=1):
        with torch.no_grad():
            given = inputs if encoded is None else {"encoder_outputs": (encoded,)}
            step = model(**given, decoder_input_ids=chunk, **cache_argument(model, past), use_cache=True)
        past, encoded = find_cache(step.values()), step.encoder_last_hidden_state
        parts.append(step.logits)
    close(torch.cat(parts, dim=1), full)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "t5"])
@EVERY_CASE
def test_generation_with_beams_static_cache_and_padding(family: str, case: Case) -> None:
    model, tokens = FAMILIES[family].make_exact(), text(6)
    case.patch(model)
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    given = {"input_ids": tokens * mask, "attention_mask": mask}
    for beams in (1, 3):
        cached = model.generate(**given, **settings, num_beams=beams)
        if looks_ahead(case):
            alone = model.generate(tokens[1:, 2:], **settings, num_beams=beams)
            assert torch.equal(cached[1, -5:], alone[0, -5:])
        else:
            assert torch.equal(cached, model.generate(**given, **settings, num_beams=beams, use_cache=False))
    greedy = model.generate(**given, **settings)
    alone = model.generate(tokens[1:, 2:], **settings)
    assert torch.equal(greedy[1, -5:], alone[0, -5:])
    if family != "t5":
        static = model.generate(**given, **settings, cache_implementation="static", disable_compile=True)
        assert torch.equal(greedy, static)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit", "t5"])
@EVERY_CASE
def test_eager_gives_attentions_and_the_same_output_as_sdpa(family: str, case: Case) -> None:
    inputs = FAMILIES[family].inputs()
    results = []
    for implementation in ("sdpa", "eager"):
        model = FAMILIES[family].make(implementation=implementation)
        case.patch(model)
        results.append(outputs(model, **inputs))
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        patched = model(**inputs, output_attentions=True)
        plain = patchattn.unpatch_model(model)(**inputs, output_attentions=True)
    name = "attentions" if "attentions" in patched else "decoder_attentions"
    assert len(patched[name]) == len(plain[name])
    for attention, expected in zip(patched[name], plain[name], strict=True):
        heads = attention.shape[1] if patchattn.variant_info(case.variant).kind == "surgery" else expected.shape[1]
        assert attention.shape == (expected.shape[0], heads, *expected.shape[2:])
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))


@EVERY_FAMILY
@EVERY_CASE
def test_every_parameter_of_a_variant_learns(family: str, case: Case) -> None:
    model = case.patch(FAMILIES[family].make()).train()
    result = model(**FAMILIES[family].inputs())
    names = ("logits", "last_hidden_state", "logits_per_text")
    torch.manual_seed(5)  # a random direction: the mean square of a normalised output is constant
    sum(
        (result[name] * torch.randn_like(result[name])).sum() for name in names if result.get(name) is not None
    ).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    variant = variant_parameters(model)
    learned = 0
    for name in variant:
        layer = name.split("patchattn.")[0]
        own = [grad for other, grad in grads.items() if other.startswith(layer) and other not in variant]
        if all(grad is None for grad in own):
            continue  # a layer whose output this model does not use: LLaVA's last vision layer
        assert grads[name] is not None, name
        assert float(grads[name].abs().max()) > 1e-7, name
        learned += 1
    assert learned or not variant


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "bert", "vit", "t5"])
@EVERY_CASE
def test_activation_checkpointing_gives_the_same_gradients(family: str, case: Case) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = FAMILIES[family].make_exact()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        case.patch(model).train()
        for name in ("attention_dropout", "dropout"):
            for module in model.modules():
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in FAMILIES[family].inputs().items()}
        model(**inputs).logits.pow(2).mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "vit", "llava"])
@EVERY_CASE
def test_copies_and_pickles_are_complete_and_independent(family: str, case: Case) -> None:
    model, inputs = case.patch(FAMILIES[family].make()), FAMILIES[family].inputs()
    pickled = pickle.dumps(model)  # before a forward: transformers then installs hooks that cannot be pickled
    expected = outputs(model, **inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickled)):
        for left, right in zip(expected, outputs(twin, **inputs), strict=True):
            assert torch.equal(left, right)
        patchattn.unpatch_model(twin)
        for left, right in zip(expected, outputs(model, **inputs), strict=True):
            assert torch.equal(left, right)


@EVERY_FAMILY
@EVERY_CASE
def test_a_saved_patch_gives_equal_outputs_on_a_fresh_base(family: str, case: Case, tmp_path: Path) -> None:
    model, inputs = case.patch(FAMILIES[family].make()), FAMILIES[family].inputs()
    patchattn.save_patch(model, tmp_path)
    loaded = patchattn.load_patch(FAMILIES[family].make(), tmp_path)
    for left, right in zip(outputs(model, **inputs), outputs(loaded, **inputs), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("family", ["llama", "bert"])
@EVERY_CASE
def test_only_adapters_and_the_variant_move_under_peft(family: str, case: Case, tmp_path: Path) -> None:
    """LoRA beside the variant's own parameters: trains, saves, reloads on a fresh base, and comes off again."""
    torch.manual_seed(0)
    inputs, targets = FAMILIES[family].inputs(), {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}[family]
    plain = outputs(FAMILIES[family].make(), **inputs)[0]
    config = LoraConfig(r=2, target_modules=targets, modules_to_save=["patchattn"])
    model = get_peft_model(case.patch(FAMILIES[family].make()), config)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model.train()(**inputs).logits.pow(2).mean().backward()
        optimizer.step()
    assert all(torch.equal(frozen[name], p) for name, p in model.named_parameters() if name in frozen)
    trained = outputs(model.eval(), **inputs)[0]
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(case.patch(FAMILIES[family].make()), tmp_path).eval()
    assert torch.equal(outputs(reloaded, **inputs)[0], trained)
    bare = patchattn.unpatch_model(model.unload())
    assert torch.equal(outputs(bare, **inputs)[0], plain)


@pytest.mark.parametrize("family", ["llama", "bert"])
@EVERY_CASE
def test_compiles_without_graph_breaks(family: str, case: Case) -> None:
    model, inputs = case.patch(FAMILIES[family].make()), FAMILIES[family].inputs()
    expected = outputs(model, **inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for left, right in zip(expected, outputs(compiled, **inputs), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    compiled.train()
    compiled(**inputs).logits.pow(2).mean().backward()
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@EVERY_CASE
def test_a_compiled_model_is_patched_decodes_and_is_unpatched(family: str, case: Case) -> None:
    """torch.compile first, patch later: the compiled code follows; a step on a static cache has no graph break."""
    model, tokens = FAMILIES[family].make(), text()
    base = outputs(model, input_ids=tokens)[0]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(outputs(compiled, input_ids=tokens)[0], base, rtol=1e-5, atol=1e-5)
    case.patch(compiled)
    expected = outputs(model, input_ids=tokens)[0]
    torch.testing.assert_close(outputs(compiled, input_ids=tokens)[0], expected, rtol=1e-5, atol=1e-5)
    cache = StaticCache(config=model.config, max_cache_len=16)
    outputs(model, input_ids=tokens[:, :-1], **cache_argument(model, cache))
    step = outputs(compiled, input_ids=tokens[:, -1:], **cache_argument(compiled, cache))[0]
    if looks_ahead(case):
        expected = decoded(model, tokens, [LENGTH - 1, 1])
    torch.testing.assert_close(step, expected[:, -1:], rtol=1e-4, atol=1e-4)
    patchattn.unpatch_model(compiled)
    torch.testing.assert_close(outputs(compiled, input_ids=tokens)[0], base, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "bert"])
@EVERY_CASE
def test_compiles_with_inductor(family: str, case: Case) -> None:
    model, inputs = case.patch(FAMILIES[family].make()), FAMILIES[family].inputs()
    expected = outputs(model, **inputs)
    torch._dynamo.reset()
    for left, right in zip(expected, outputs(torch.compile(model, fullgraph=True), **inputs), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "bert", "vit", "t5", "llava"])
@EVERY_CASE
def test_half_precision_and_autocast(family: str, case: Case) -> None:
    inputs = FAMILIES[family].inputs()
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    model = case.patch(FAMILIES[family].make().bfloat16())
    assert {p.dtype for p in variant_parameters(model).values()} <= {torch.bfloat16}
    result = outputs(model, **half)[0]
    assert result.dtype == torch.bfloat16
    assert bool(result.isfinite().all())
    model = case.patch(FAMILIES[family].make())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert bool(outputs(model, **inputs)[0].isfinite().all())


@pytest.mark.parametrize("family", ["llama", "bert", "vit", "t5"])
@EVERY_CASE
def test_batch_of_one_and_single_token(family: str, case: Case) -> None:
    model, inputs = case.patch(FAMILIES[family].make()), FAMILIES[family].inputs()
    for left, right in zip(
        outputs(model, **{name: value[:1] for name, value in inputs.items()}), outputs(model, **inputs), strict=True
    ):
        torch.testing.assert_close(left, right[:1], rtol=1e-4, atol=1e-4)
    if family in ("llama", "bert"):
        assert outputs(model, input_ids=text(1))[0].shape[:2] == (2, 1)


@pytest.mark.parametrize("family", ["llama", "llava", "t5", "vit"])
@EVERY_CASE
def test_only_the_chosen_layers_change(family: str, case: Case) -> None:
    model = FAMILIES[family].make()
    case.patch(model, layers=1)
    info = patchattn.patch_info(model)
    (chosen,) = [set(patch["sites"]) for patch in info["patches"]]
    assert chosen  # some variants leave out a vision tower
    for site in info["sites"]:
        assert site["variants"] == ([case.variant] if site["name"] in chosen else [])
        assert site["layer_index"] == 1 or site["name"] not in chosen


@EVERY_CASE
def test_packed_sequences_equal_separate_ones(case: Case) -> None:
    model, tokens = case.patch(FAMILIES["llama"].make_exact()), text()
    lengths = (LENGTH, 5)
    packed = torch.cat([tokens[:1], tokens[1:, :5]], dim=1)
    numbers = torch.cat([torch.arange(length) for length in lengths])[None]
    together = outputs(model, input_ids=packed, position_ids=numbers, use_cache=False)[0]
    close(together[:, :LENGTH], outputs(model, input_ids=tokens[:1])[0])
    close(together[:, LENGTH:], outputs(model, input_ids=tokens[1:, :5])[0])
