"""Sinks, learned slots and forgetting without gradients on a CPU: keys are not widened, numbers those of float64."""

from typing import Any

import pytest
import torch

import patchattn
from patchattn.softmax import biases, slots

from .behaviour import randomise
from .reference import DIM, HEADS, KV_HEADS, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13], [2, 8, 8, 1, 30, 4, 6]])
LENGTH, GROUP = TOKENS.shape[1], HEADS // KV_HEADS


@pytest.mark.parametrize("name", ["sink", "attention_bias", "meta_tokens", "fox"])
@torch.no_grad()
def test_a_prompt_is_exact_and_its_keys_are_not_widened(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    found: list[torch.Tensor] = []
    biased = biases.attend_with_lse

    def keep(call: Any, bias: torch.Tensor) -> Any:
        found.append(bias)
        return biased(call, bias)

    def wider(*_: Any) -> Any:
        raise AssertionError("keys were widened")

    model = patchattn.patch_model(tiny_llama(), name)
    randomise(model)
    monkeypatch.setattr(biases, "attend_with_lse", keep)
    monkeypatch.setattr(slots, "attend_wider", wider)
    monkeypatch.setattr(biases, "attend_wider", wider)
    with patchattn.probed(model, lambda call, output: seen.append((call, output))):
        model(TOKENS)
    call, got = seen[0]
    own = getattr(model.model.layers[0].self_attn.patchattn, name)
    key, value = (each.double().repeat_interleave(GROUP, dim=1) for each in (call.key, call.value))
    logits = call.query.double() @ key.mT * DIM**-0.5
    if found:
        logits = logits + found[0][:, :, None].double()
    masses = logits.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), float("-inf")).exp()
    want, total = masses @ value, masses.sum(-1, keepdim=True)
    if name != "fox":
        keys, values = own.slot_key(), own.slot_value()
        products = torch.zeros(1, 1, 1, 1).double()
        if keys is not None:
            products = call.query.double() @ keys.double().repeat_interleave(GROUP, dim=0).mT * DIM**-0.5
        slot = (own.slots(call).double()[:, None, None] + products).exp()
        total = total + slot.sum(-1, keepdim=True)
        if values is not None:
            want = want + slot @ values.double().repeat_interleave(GROUP, dim=0)
    want = want / total
    torch.testing.assert_close(got.double(), want.transpose(1, 2), rtol=1e-5, atol=1e-6)
