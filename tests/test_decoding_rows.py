"""Decoding with terms in the softmax: a step copies no keys, and is the row of one forward."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import patchattn

from .families import FAMILIES
from .reference import DIM, KV_HEADS, tiny_llama

TEXT = 40
VARIANTS = {
    "sink": {"initial_logit": 0.5},
    "attention_bias": {},
    "meta_tokens": {"tokens": 3, "initial_logit": 0.0},
    "fox": {"scaled": False, "initial_bias": 2.0},
    "entmax": {},
}


class Copies(TorchDispatchMode):
    """How many tensors as large as all keys operations make, other than views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        of_others = func._schema.is_mutable or any(value.alias_info is not None for value in func._schema.returns)
        if isinstance(result, torch.Tensor) and not of_others and result.numel() >= 2 * KV_HEADS * TEXT * DIM:
            self.count += 1
        return result


def prepared(name: str, dtype: torch.dtype) -> Any:
    model = patchattn.patch_model(tiny_llama(), name, VARIANTS[name]).to(dtype)
    torch.manual_seed(4)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".patchattn." in key:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def last_step(model: Any, tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Logits of the last token, and how many copies of keys or values its step makes, the one before it done."""
    cache = model(tokens[:, :-2], attention_mask=mask[:, :-2]).past_key_values
    model(tokens[:, -2:-1], attention_mask=mask[:, :-1], past_key_values=cache)
    with Copies() as made:
        last = model(tokens[:, -1:], attention_mask=mask, past_key_values=cache).logits
    return last[:, 0], made.count


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_a_step_copies_no_keys_and_is_a_row_of_one_forward(name: str) -> None:
    model = prepared(name, torch.float64)
    tokens = torch.randint(1, 50, (2, TEXT), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    whole = model(tokens, attention_mask=mask).logits
    last, copies = last_step(model, tokens, mask)
    torch.testing.assert_close(last, whole[:, -1], rtol=0, atol=1e-10)
    of_the_cache = last_step(tiny_llama(), tokens, torch.ones_like(mask))[1]
    assert of_the_cache == 2  # transformers joins keys, and values, and sdpa copies none of them
    assert copies <= of_the_cache


@pytest.mark.parametrize("name", ["sink", "attention_bias", "fox"])
@torch.no_grad()
def test_what_is_no_plain_row_goes_on_as_before(name: str) -> None:
    """Half precision, and bases that are asked for weights, against the same step in float64."""
    tokens = torch.randint(1, 50, (2, TEXT), generator=torch.Generator().manual_seed(0))
    exact, half = prepared(name, torch.float64), prepared(name, torch.bfloat16)
    exact.load_state_dict({key: t.double() if t.is_floating_point() else t for key, t in half.state_dict().items()})
    want = exact(tokens).logits[:, -1]
    scale = float(want.abs().max())
    cache = half(tokens[:, :-1]).past_key_values
    got = half(tokens[:, -1:], past_key_values=cache).logits[:, 0]
    assert float((got.double() - want).abs().max()) < 0.1 * scale
    exact.set_attn_implementation("eager")
    cache = exact(tokens[:, :-1]).past_key_values
    step = exact(tokens[:, -1:], past_key_values=cache, output_attentions=True)
    torch.testing.assert_close(step.logits[:, 0], want, rtol=0, atol=1e-5)  # eager weights are float32
    assert step.attentions[0].shape == (2, 4, 1, TEXT)


@torch.no_grad()
def test_sinks_of_the_model_stay_in_the_softmax_of_a_step() -> None:
    model = patchattn.patch_model(FAMILIES["gpt_oss"].make().float(), "sink", initial_logit=0.5)
    tokens = FAMILIES["gpt_oss"].inputs()["input_ids"]
    cache = model(tokens[:, :-1]).past_key_values
    got = model(tokens[:, -1:], past_key_values=cache).logits[:, 0]
    torch.testing.assert_close(got, model(tokens).logits[:, -1], rtol=1e-4, atol=1e-4)
