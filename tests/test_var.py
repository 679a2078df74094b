"""VAR against attention matrices written out from the equations, in float64."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given as for_all
from hypothesis import settings as how
from hypothesis import strategies as st
from torch import nn
from transformers import DynamicCache, StaticCache

import patchattn
from patchattn.core.call import AttentionCall
from patchattn.core.chain import attention_call
from patchattn.core.kv_caches import cache_argument
from patchattn.core.module_call import ModuleCall
from patchattn.core.run import RESIDUAL, RUN, ModelRun
from patchattn.core.surroundings import LayerContext
from patchattn.variants.sinks.var import VAR, VARConfig
from patchattn.vision.marks import IMAGE_TOKENS

from . import vlms
from .var_reference import (
    FAMILIES,
    LOW,
    SETTINGS,
    are_sinks,
    brute_force,
    close,
    exact,
    expected,
    extended,
    logits_of,
    redistribute,
)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_forward_of_a_padded_batch(name: str, settings: dict[str, Any]) -> None:
    model, given = exact(name)
    wanted, plain = expected(model, given, {**LOW, **settings}), logits_of(model, given)
    patchattn.patch_model(model, "var", **{**LOW, **settings})
    real = given["attention_mask"].bool()
    got = logits_of(model, given)
    torch.testing.assert_close(got[real], wanted[real], rtol=1e-9, atol=1e-9)
    assert float((plain - wanted)[real].abs().max()) > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_a_padded_batch_are_those_of_each_alone(name: str) -> None:
    model, given = exact(name)
    patchattn.patch_model(model, "var", **LOW)
    together = logits_of(model, given)
    for row in range(2):
        alone = vlms.single(given, row)
        close(together[row, given["attention_mask"][row].bool()], logits_of(model, alone)[0])


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@pytest.mark.parametrize("name", FAMILIES)
def test_generation_in_a_padded_batch(name: str, implementation: str) -> None:
    model, given = exact(name)
    base = copy.deepcopy(model)
    patchattn.patch_model(model, "var", **LOW)
    kind = None if implementation == "dynamic" else implementation
    found = model.generate(
        **given,
        max_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        cache_implementation=kind,
        disable_compile=True,
    )
    new = found.sequences[:, -4:]
    wanted = expected(base, extended(given, new), LOW)
    close(torch.stack(found.logits, dim=1).double(), wanted[:, -5:-1])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_beams(name: str) -> None:
    model, given = exact(name)
    base = copy.deepcopy(model)
    patchattn.patch_model(model, "var", **LOW)
    found = model.generate(
        **given,
        max_new_tokens=3,
        do_sample=False,
        num_beams=3,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    new = found.sequences[:, -3:]
    log_p = expected(base, extended(given, new), LOW)[:, -4:-1].log_softmax(-1)
    close(found.sequences_scores.double(), log_p.gather(-1, new[..., None]).sum((1, 2)))


@pytest.mark.parametrize("kind", ["none", "dynamic", "static"])
@pytest.mark.parametrize("chunks", [[2, 17, 3], [18, 1, 1, 1, 1]], ids=str)
def test_a_prompt_in_chunks(chunks: list[int], kind: str) -> None:
    """Text before the image, the image, and text token by token: marks of the image stay with the cache."""
    model, given = exact("llava")
    given = vlms.single(given, 0)
    wanted = expected(model, given, LOW)
    patchattn.patch_model(model, "var", **LOW)
    if kind == "none":
        close(logits_of(model, given, use_cache=False), wanted)
        return
    config = model.config.get_text_config()
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, max_cache_len=30)
    parts = []
    for part in given["input_ids"].split(chunks, dim=1):
        pixels = {"pixel_values": given["pixel_values"]} if bool((part == vlms.IMAGE).any()) else {}
        parts.append(logits_of(model, {"input_ids": part, **pixels}, **cache_argument(model, cache)))
    torch.testing.assert_close(torch.cat(parts, dim=1), wanted, rtol=1e-9, atol=1e-9)


def test_several_images_and_text_between_them() -> None:
    model, given = exact("llava")
    image = torch.full((1, 16), vlms.IMAGE)
    text = torch.tensor([[5, 9]]), torch.tensor([[7, 8, 9]]), torch.tensor([[6, 7]])
    several = {
        "input_ids": torch.cat([text[0], image, text[1], image, text[2]], dim=1),
        "pixel_values": given["pixel_values"],
    }
    wanted = expected(model, several, LOW)
    patchattn.patch_model(model, "var", **LOW)
    torch.testing.assert_close(logits_of(model, several), wanted, rtol=1e-9, atol=1e-9)


def test_a_cropped_cache_goes_on() -> None:
    """What is known of a key does not depend on later ones, so that tokens can be taken back."""
    model, given = exact("llava")
    given = vlms.single(given, 0)
    wanted = expected(model, given, LOW)
    patchattn.patch_model(model, "var", **LOW)
    cache = DynamicCache(config=model.config.get_text_config())
    other = extended({**given, "input_ids": given["input_ids"][:, :-2]}, torch.tensor([[30, 31, 32]]))
    logits_of(
        model, {"input_ids": other["input_ids"], "pixel_values": given["pixel_values"]}, **cache_argument(model, cache)
    )
    cache.crop(-3)
    got = logits_of(model, {"input_ids": given["input_ids"][:, -2:]}, **cache_argument(model, cache))
    torch.testing.assert_close(got, wanted[:, -2:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_weights_of_the_eager_implementation(name: str) -> None:
    model, given = vlms.make(name), vlms.inputs(name)  # in float64 eager's padded rows are NaN
    model.set_attn_implementation("eager")
    with brute_force(model, given["input_ids"] == vlms.IMAGE, LOW) as twin, torch.no_grad():
        wanted = twin(**given, output_attentions=True).attentions
    patchattn.patch_model(model, "var", **LOW)
    with torch.no_grad():
        attentions = model(**given, output_attentions=True).attentions
    real = given["attention_mask"].bool()[:, None].expand(-1, 4, -1)
    for got, exactly in zip(attentions, wanted, strict=True):
        close(got[real].double(), exactly[real])
        torch.testing.assert_close(got[real].sum(-1), torch.ones(int(real.sum())))


def test_what_is_reported() -> None:
    model, given = exact("llava")
    image = given["input_ids"] == vlms.IMAGE
    inputs: list[torch.Tensor] = []
    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
    patchattn.patch_model(model, "var", **LOW)
    seen: list[dict[str, torch.Tensor]] = []
    with patchattn.observe(model, lambda observation: seen.append(observation.values)):
        logits_of(model, given)
    assert len(seen) == 2
    for values, hidden in zip(seen, inputs, strict=True):
        assert torch.equal(values["image_keys"], image)
        np.testing.assert_array_equal(values["sink_keys"], are_sinks(hidden.numpy(), LOW))
        assert not bool(values["image_centric"][image].any())
        assert bool(values["image_centric"].any())


# --- one call ---------------------------------------------------------------------------------------------------------


def one_call(
    rows: int, image: slice, seed: int, settings: dict[str, Any], dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, np.ndarray, torch.Tensor]:
    """VAR on random tensors: its output `(2, N, D)`, the equations' weights `(2, N, N)`, and the values."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, 2, rows, 8, generator=generator).to(dtype) for _ in "qkv")
    hidden = torch.randn(1, rows, 32, generator=generator).to(dtype)
    marks = torch.zeros(1, rows, dtype=torch.bool)
    marks[:, image] = True
    model = vlms.make("llava")
    (site, *_) = [s for s in patchattn.find_sites(model) if "language_model" in s.name]
    module = model.get_submodule(site.name)
    variant = VAR(VARConfig(**{**LOW, **settings}), site)
    context = LayerContext(module=module, layer_input=hidden, memory=None, attention_mask=None, arguments={})
    told = {RUN: ModelRun(facts={IMAGE_TOKENS: marks, RESIDUAL: hidden})}
    call = attention_call(ModuleCall(module, query, key, value, None, told), site, "sdpa", context)
    call = call.replace(facts=call.context.remembered("var", variant.key_facts(call)))

    def inner(call: AttentionCall) -> Any:
        out = nn.functional.scaled_dot_product_attention(call.query, call.key, call.value, is_causal=True)
        return out.transpose(1, 2), None

    got = variant.attend(call, inner)[0][0].transpose(0, 1)
    visible = torch.ones(rows, rows, dtype=torch.bool).tril()
    logits = (query.double() @ key.double().mT * 8**-0.5).masked_fill(~visible, -torch.inf)
    sinks = are_sinks(hidden[0].double().numpy(), {**LOW, **settings})
    weights = logits[0].softmax(-1).numpy()
    changed = np.stack([redistribute(w, sinks, marks[0].numpy(), settings) for w in weights])
    return got, changed, value[0]


@how(max_examples=30, deadline=None)
@for_all(
    rows=st.integers(2, 20),
    start=st.integers(0, 8),
    length=st.integers(0, 12),
    seed=st.integers(0, 1000),
    move=st.floats(0.01, 1.0),
    most=st.floats(0.0, 1.0),
    least=st.floats(0.0, 1.0),
    threshold=st.floats(0.0, 3.0),
)
def test_any_settings_on_any_tensors(
    rows: int, start: int, length: int, seed: int, move: float, most: float, least: float, threshold: float
) -> None:
    settings = {
        "move_fraction": move,
        "max_sink_share": most,
        "min_image_share": least,
        "sink_threshold": threshold,
    }
    got, changed, value = one_call(rows, slice(start, start + length), seed, settings)
    np.testing.assert_allclose(changed.sum(-1), 1.0, rtol=1e-12)
    assert (changed >= 0).all()
    np.testing.assert_allclose(got, changed @ value.numpy(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_worse_than_twice_the_weights_rounded(dtype: torch.dtype) -> None:
    """The released form rounds the new weights to the model's dtype."""
    settings = {"max_sink_share": 0.9, "min_image_share": 0.0, "sink_threshold": 1.5}
    got, changed, value = one_call(64, slice(2, 40), 0, settings, dtype)
    assert got.dtype == dtype
    weights = torch.from_numpy(changed)
    reference = weights @ value.double()
    rounded = (weights.to(dtype) @ value).double()
    assert float((got.double() - reference).abs().max()) <= 2 * float((rounded - reference).abs().max())


def test_bfloat16_model_stays_near_the_exact_one() -> None:
    model, given = exact("llava")
    patchattn.patch_model(model, "var", **LOW)
    wanted = logits_of(model, given)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in given.items()}
    got = logits_of(model.bfloat16(), half)
    real = given["attention_mask"].bool()
    assert got.dtype == torch.bfloat16
    error, spread = (got.double() - wanted)[real], wanted[real]
    assert float(error.pow(2).mean().sqrt()) < 0.15 * float(spread.std())
