"""SSA against its formula (arXiv 2411.12892), computed independently in numpy."""

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import patchattn

from .behaviour import randomise, variant_parameters
from .families import FAMILIES, outputs
from .reference import attend, layer_in_and_out, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13]])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"key": True},
        {"query": False},
        {"value": False, "token_aware": False},
        {"key": True, "position_aware": False},
    ],
    ids=str,
)
def test_temperatures_follow_the_formula(settings: dict) -> None:
    model = patchattn.patch_model(tiny_llama(), "ssa", **settings)
    randomise(model)
    variant = model.model.layers[0].self_attn.patchattn.ssa
    weights = {name: p.detach().numpy() for name, p in variant.named_parameters()}
    streams = {"query": True, "key": False, "value": True, **settings}

    def scale(stream: str, x: np.ndarray, n: int) -> float:
        if not streams[stream]:
            return 1.0
        tau = 1.0
        if settings.get("token_aware", True):
            tau += np.tanh(weights[f"{stream}_token"] @ x)
        if settings.get("position_aware", True):
            tau += np.log(n) / (1 + np.exp(-weights[f"{stream}_alpha"][0]))
        return tau

    inputs, got = layer_in_and_out(model, TOKENS)
    want = attend(model.model.layers[0].self_attn, inputs[0], scale=scale)
    np.testing.assert_allclose(got[0], want, rtol=1e-5, atol=1e-7)  # transformers' rotary angles are float32


def test_identity_at_the_start_with_gradients_for_every_parameter() -> None:
    model = tiny_llama()
    before = outputs(model, input_ids=TOKENS)[0]
    patchattn.patch_model(model, "ssa", key=True)
    logits = model(TOKENS).logits
    # sigmoid(-7) = 0.0009 times log 7 is all that is left of the start
    torch.testing.assert_close(logits, before, rtol=0.05, atol=0.05)
    (logits * torch.randn_like(logits)).sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in variant_parameters(model).values())


def test_keys_are_scaled_behind_their_norm() -> None:
    """A factor on the key projection would be cancelled by Qwen3's key norm."""
    model, inputs = FAMILIES["qwen3"].make(), FAMILIES["qwen3"].inputs()
    before = outputs(model, **inputs)[0]
    patchattn.patch_model(model, "ssa", query=False, key=True, value=False, position_aware=False)
    randomise(model)
    assert float((outputs(model, **inputs)[0] - before).abs().max()) > 1e-2


def test_what_the_cache_holds_is_scaled_once() -> None:
    model = patchattn.patch_model(tiny_llama(), "ssa", query=False, token_aware=False, initial_alpha=0.0)
    plain, scaled = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for start in range(0, 7, 2):
        outputs(model, input_ids=TOKENS[:, start : start + 2], past_key_values=scaled)
    with patchattn.unpatched(model):
        outputs(model, input_ids=TOKENS, past_key_values=plain)
    factor = 1 + 0.5 * torch.arange(1, 8).double().log()
    torch.testing.assert_close(scaled.layers[0].values, plain.layers[0].values * factor[:, None])
    torch.testing.assert_close(scaled.layers[0].keys, plain.layers[0].keys)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"query": False, "value": False}, "scales nothing"),
        ({"token_aware": False, "position_aware": False}, "no temperature left"),
        ({"query": 1}, "query must be bool"),
        ({"initial_alpha": float("nan")}, "initial_alpha must lie between"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        patchattn.patch_model(tiny_llama(), "ssa", **settings)
