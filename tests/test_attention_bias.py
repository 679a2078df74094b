"""Attention biases against explicit sums in float64."""

from typing import Any

import pytest
import torch

import patchattn

from .behaviour import variant_parameters
from .families import outputs
from .reference import DIM, HEADS, KV_HEADS, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13], [2, 8, 8, 1, 30, 4, 6]])


def drawn(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """A key and a value `(Hkv, D)` of no token, put into the only layer."""
    generator = torch.Generator().manual_seed(1)
    key, value = (torch.randn(KV_HEADS, DIM, generator=generator).double() for _ in range(2))
    own = model.model.layers[0].self_attn.patchattn.attention_bias
    with torch.no_grad():
        own.key.copy_(key)
        own.value.copy_(value)
    return key, value


def look(model: torch.nn.Module, **inputs: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """The call outside of all variants, and what it gave."""
    seen: list[Any] = []
    with torch.no_grad(), patchattn.probed(model, lambda call, output: seen.append((call, output))):
        model(**inputs)
    return seen[0]


@pytest.mark.parametrize(("implementation", "tolerance"), [("sdpa", 1e-12), ("eager", 1e-6)])  # float32 inside
@pytest.mark.parametrize("logit", [0.0, -1.5])
@pytest.mark.parametrize("padded", [False, True])
def test_every_row_sees_one_more_key(implementation: str, tolerance: float, logit: float, padded: bool) -> None:
    model = patchattn.patch_model(tiny_llama(attn_implementation=implementation), "attention_bias", logit=logit)
    more_keys, more_values = drawn(model)
    mask = torch.ones_like(TOKENS)
    mask[1, :3] = 1 - int(padded)
    call, got = look(model, input_ids=TOKENS, attention_mask=mask)
    for sequence in range(2):
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            for row in mask[sequence].nonzero()[:, 0].tolist():
                query = call.query[sequence, head, row]
                seen = [j for j in range(row + 1) if mask[sequence, j]]
                masses = [float((query @ call.key[sequence, group, j] * DIM**-0.5).exp()) for j in seen]
                own = float((query @ more_keys[group] * DIM**-0.5 + logit).exp())
                total = sum(masses) + own
                want = own / total * more_values[group]
                for mass, j in zip(masses, seen, strict=True):
                    want = want + mass / total * call.value[sequence, group, j]
                torch.testing.assert_close(got[sequence, row, head], want, rtol=0, atol=tolerance)


def test_three_logits_of_zero_share_alike() -> None:
    """Queries of zero: two tokens and the learned key get a third each."""
    model = patchattn.patch_model(tiny_llama(attn_implementation="eager"), "attention_bias")
    drawn(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()
        weights = model(TOKENS[:1, :2], output_attentions=True).attentions[0]
    torch.testing.assert_close(weights[0, :, 1], torch.full((HEADS, 2), 1 / 3).double(), rtol=0, atol=1e-6)


def test_a_key_and_a_value_of_zero_are_a_sink() -> None:
    model = patchattn.patch_model(tiny_llama(), "attention_bias", initial_std=0.0, logit=-0.75)
    got = outputs(model, input_ids=TOKENS)[0]
    other = patchattn.patch_model(tiny_llama(), "sink", initial_logit=-0.75)
    torch.testing.assert_close(got, outputs(other, input_ids=TOKENS)[0], rtol=0, atol=1e-12)


def test_the_model_at_the_limit_and_what_is_trained() -> None:
    model = tiny_llama()
    before = outputs(model, input_ids=TOKENS)[0]
    with patchattn.patched(model, "attention_bias", logit=-1000.0):
        assert torch.equal(outputs(model, input_ids=TOKENS)[0], before)
    torch.manual_seed(0)
    patchattn.patch_model(model, "attention_bias")
    assert patchattn.patch_info(model)["extra_parameters"] == 2 * KV_HEADS * DIM
    logits = model(TOKENS).logits
    (logits * torch.randn_like(logits)).sum().backward()
    for parameter in variant_parameters(model).values():
        assert 0.01 < float(parameter.detach().std()) < 0.03
        assert bool((parameter.grad.abs() > 0).all())


def test_generating_is_one_forward() -> None:
    model = patchattn.patch_model(tiny_llama(num_hidden_layers=2), "attention_bias", initial_std=1.0)
    mask = torch.ones_like(TOKENS)
    mask[1, :2] = 0
    how: Any = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    found = model.generate(TOKENS, attention_mask=mask, pad_token_id=0, **how)
    whole = torch.cat([mask, mask.new_ones(2, 3)], dim=1)
    place = (whole.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        want = model(found.sequences[:, :-1], attention_mask=whole, position_ids=place).logits[:, 6:]
    torch.testing.assert_close(torch.stack(found.logits, 1).double(), want, rtol=1e-5, atol=1e-5)
