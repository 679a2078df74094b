"""Scalable-Softmax against its formula (arXiv 2501.19399), computed independently in numpy."""

from typing import Any

import numpy as np
import pytest
import torch

import patchattn

from .behaviour import randomise, variant_parameters
from .families import FAMILIES, outputs
from .reference import HEADS, attend, layer_in_and_out, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13]])


@pytest.mark.parametrize("settings", [{}, {"bias": False, "initial_scale": 0.5}], ids=["bias", "no_bias"])
def test_logits_follow_the_formula(settings: dict[str, Any]) -> None:
    model = patchattn.patch_model(tiny_llama(), "ssmax", **settings)
    randomise(model)
    module = model.model.layers[0].self_attn
    weights = {name: p.detach().numpy() for name, p in module.patchattn.ssmax.named_parameters()}
    inputs, got = layer_in_and_out(model, TOKENS)
    want = 0.0
    for head in range(HEADS):  # one head at a time: all others are gated away, then the parts of the sum are added
        only = np.eye(HEADS)[head]
        factor = [weights["scale"][head] * np.log(n) + weights.get("bias", np.zeros(HEADS))[head] for n in range(1, 8)]
        want += attend(
            module,
            inputs[0],
            scale=lambda stream, x, n, factor=factor: factor[n - 1] if stream == "query" else 1.0,
            gate=lambda x, queries, only=only: only,
        )
    np.testing.assert_allclose(got[0], want, rtol=1e-5, atol=1e-7)


def test_identity_at_the_start_with_gradients_for_every_parameter() -> None:
    model = tiny_llama()
    before = outputs(model, input_ids=TOKENS)[0]
    patchattn.patch_model(model, "ssmax")
    assert patchattn.patch_info(model)["extra_parameters"] == 2 * HEADS
    logits = model(TOKENS).logits
    assert torch.equal(logits, before)
    (logits * torch.randn_like(logits)).sum().backward()
    assert all(bool((p.grad.abs() > 0).all()) for p in variant_parameters(model).values())


def test_the_form_of_the_paper() -> None:
    model = patchattn.patch_model(tiny_llama(), "ssmax", preset="from_scratch")
    (scale,) = variant_parameters(model).values()
    torch.testing.assert_close(scale.detach(), torch.full((HEADS,), 0.168, dtype=scale.dtype), rtol=0, atol=1e-6)
    variant = model.model.layers[0].self_attn.patchattn.ssmax
    assert variant.fast_parameters() == [scale]
    query = torch.randn(1, HEADS, 7, 8, dtype=torch.float64)
    want = query * 0.168 * torch.arange(1, 8).log()[:, None]
    factor = variant.factor(torch.arange(1, 8)[None].log())
    torch.testing.assert_close(query * factor.transpose(1, 2)[..., None], want, rtol=1e-6, atol=1e-6)


def test_both_parameters_learn_fast() -> None:
    variant = patchattn.patch_model(tiny_llama(), "ssmax").model.layers[0].self_attn.patchattn.ssmax
    assert {id(p) for p in variant.fast_parameters()} == {id(variant.scale), id(variant.bias)}


def test_a_sliding_window_bounds_the_number_of_visible_keys() -> None:
    model = patchattn.patch_model(FAMILIES["mistral"].make(), "ssmax", initial_scale=1.0)  # a window of 4
    seen: list[patchattn.Observation] = []
    with patchattn.observe(model, seen.append):
        outputs(model, **FAMILIES["mistral"].inputs())
    want = 1 + torch.tensor([1, 2, 3, *[4] * 6]).log()
    for observation in seen:
        factor = observation.values["query_temperature"]
        torch.testing.assert_close(factor[0], want[:, None].expand(-1, 4))


def test_a_start_that_would_flatten_all_attention_is_refused() -> None:
    with pytest.raises(ValueError, match='initial_scale other than 0, or take preset="from_scratch"'):
        patchattn.patch_model(tiny_llama(), "ssmax", bias=False)
