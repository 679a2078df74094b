"""Decoding in half precision reads keys as they are: sinks, learned keys and FoX's sums against float64."""

from typing import Any

import pytest
import torch

import patchattn
from patchattn.core.kv_caches import cache_argument
from patchattn.softmax import biases, rows, slots

from .behaviour import randomise
from .reference import DIM, HEADS, KV_HEADS, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13], [2, 8, 8, 1, 30, 4, 6]])
MASK = torch.ones_like(TOKENS)
MASK[1, :3] = 0
GROUP = HEADS // KV_HEADS


def decoded(model: Any) -> tuple[Any, torch.Tensor]:
    """The call of the last token after a prompt in one piece, outside of all variants, and what it gave."""
    seen: list[Any] = []
    place = (MASK.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        cache = model(TOKENS[:, :-1], attention_mask=MASK[:, :-1], position_ids=place[:, :-1], use_cache=True)
        with patchattn.probed(model, lambda call, output: seen.append((call, output))):
            past = cache_argument(model, cache.past_key_values)
            model(TOKENS[:, -1:], attention_mask=MASK, position_ids=place[:, -1:], **past)
    return seen[0]


def terms(call: Any, sequence: int, head: int, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Exponentials `(n,)` and values `(n, D)` of the real keys, from the call in float64."""
    real = MASK[sequence].bool()
    logits = call.key[sequence, head // GROUP, real].double() @ call.query[sequence, head, 0].double() * DIM**-0.5
    if bias is not None:
        logits = logits + bias[sequence, head, real].double()
    return logits.exp(), call.value[sequence, head // GROUP, real].double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sink", "attention_bias", "fox"])
def test_one_row_is_exact_and_copies_no_keys(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[torch.Tensor] = []

    def keep(call: Any, bias: torch.Tensor) -> Any:
        found.append(bias * 8)  # far apart: in bfloat16 these would not be told from each other
        return rows.attend_half_row(call, found[-1])

    def wider(call: Any, *rest: Any) -> Any:
        assert call.query.shape[2] > 1
        return original(call, *rest)

    original = slots.attend_wider
    monkeypatch.setattr(slots, "attend_wider", wider)
    monkeypatch.setattr(biases, "attend_wider", wider)
    model = patchattn.patch_model(tiny_llama(), name).to(dtype)
    randomise(model)
    if name == "fox":
        monkeypatch.setattr(biases, "attend_half_row", keep)
    call, got = decoded(model)
    own = getattr(model.model.layers[0].self_attn.patchattn, name)
    for sequence in range(2):
        for head in range(HEADS):
            masses, values = terms(call, sequence, head, found[-1] if found else None)
            more, slot = torch.zeros(()).double(), torch.zeros(DIM).double()
            if name == "sink":
                more = own.logit[head].double().exp()
            if name == "attention_bias":
                key, slot = own.key[head // GROUP].double(), own.value[head // GROUP].double()
                more = (key @ call.query[sequence, head, 0].double() * DIM**-0.5).exp()
            want = (masses @ values + more * slot) / (masses.sum() + more)
            torch.testing.assert_close(got[sequence, 0, head].double(), want, rtol=2**-7, atol=2**-8)


def test_a_bias_by_position_is_added_and_a_row_that_sees_nothing_is_empty() -> None:
    call, _ = decoded(patchattn.patch_model(tiny_llama(), "sink").bfloat16())
    given = torch.randn(1, HEADS, 1, TOKENS.shape[1])
    call = call.replace(kwargs={**call.kwargs, "position_bias": given})
    output, lse = rows.attend_half_row(call)
    for sequence in range(2):
        for head in range(HEADS):
            masses, values = terms(call, sequence, head, given[:, :, 0].expand(2, -1, -1))
            torch.testing.assert_close(lse[sequence, head, 0].double(), masses.sum().log(), rtol=0, atol=1e-3)
            want = masses @ values / masses.sum()
            torch.testing.assert_close(output[sequence, 0, head].double(), want, rtol=2**-7, atol=2**-8)
    output, lse = rows.attend_half_row(call.seeing(torch.zeros(2, 1, 1, TOKENS.shape[1], dtype=torch.bool)))
    assert not output.any()
    assert bool((lse == float("-inf")).all())


def test_what_it_does_not_compute() -> None:
    call, _ = decoded(patchattn.patch_model(tiny_llama(), "sink").bfloat16())
    assert rows.attend_half_row(call) is not None
    assert rows.attend_half_row(call.replace(query=call.query.float())) is None
    assert rows.attend_half_row(call.replace(kwargs={**call.kwargs, "softcap": 5.0})) is None
    assert rows.attend_half_row(call.replace(query=call.query.requires_grad_())) is None
    assert rows.attend_half_row(call.replace(query=call.query.expand(-1, -1, 2, -1))) is None
