"""Several calls under one softmax, against that softmax over all their logits written out in float64."""

from typing import Any

import numpy as np
import pytest
import torch

from patchattn import probed
from patchattn.core.call import AttentionCall
from patchattn.softmax.merging import merged

from .families import FAMILIES


def a_call(family: str, implementation: str | None = None) -> AttentionCall:
    """Of the second layer, on two sequences of nine tokens."""
    seen: list[AttentionCall] = []
    model = FAMILIES[family].make(implementation=implementation)
    with torch.no_grad(), probed(model, lambda call, output: seen.append(call), layers=1):
        model(**FAMILIES[family].inputs())
    return seen[0]


def one_softmax(call: AttentionCall, other: AttentionCall, is_near: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Output `(B, T, H, D)` and weights `(B, H, T, T)` of rows that meet near keys in one call, the rest in another."""
    tensors: list[Any] = [t.double().numpy() for t in (call.query, call.key, other.query, other.key, call.value)]
    query, key, far_query, far_key, value = tensors
    batch, heads, length, _ = query.shape
    seen = call.mask.seen().expand(batch, heads, -1, -1).numpy()
    cap, sinks = call.kwargs.get("softcap"), call.kwargs.get("s_aux")
    weights, output = np.zeros((batch, heads, length, length)), np.zeros((batch, length, heads, value.shape[-1]))
    for row, head, token in np.ndindex(batch, heads, length):
        group = head // (heads // key.shape[1])
        places = [place for place in range(length) if seen[row, head, token, place]]
        logits = []
        for place in places:
            near = is_near[token, place]
            pair = (query, key) if near else (far_query, far_key)
            logit = pair[0][row, head, token] @ pair[1][row, group, place] * call.scaling
            logits.append(cap * np.tanh(logit / cap) if cap else logit)
        sums = np.exp(logits).sum() + (np.exp(float(sinks[head])) if sinks is not None else 0.0)
        weights[row, head, token, places] = np.exp(logits) / sums
        output[row, token, head] = weights[row, head, token] @ value[row, group]
    return output, weights


@pytest.mark.parametrize(
    ("family", "implementation"),
    [("llama", None), ("llama", "eager"), ("gemma2", None), ("gpt_oss", None)],
    ids=["grouped", "with_weights", "softcap", "sinks"],
)
def test_two_calls_are_one_softmax(family: str, implementation: str | None) -> None:
    """Also where a row sees keys in one of them alone, as the first row does."""
    call = a_call(family, implementation)
    generator = torch.Generator().manual_seed(1)
    far = call.replace(
        query=torch.randn(call.query.shape, generator=generator), key=torch.randn(call.key.shape, generator=generator)
    )
    is_near = torch.arange(9)[:, None] - torch.arange(9) < 3
    with torch.no_grad():
        output, weights = merged(call.seeing(is_near[None, None]), far.seeing(~is_near[None, None]))
        expected, shares = one_softmax(call, far, is_near.numpy())
    np.testing.assert_allclose(output.double().numpy(), expected, atol=2e-6, rtol=2e-5)
    if call.base == "sdpa":
        assert weights is None
    else:
        assert weights is not None
        np.testing.assert_allclose(weights.double().numpy(), shares, atol=1e-6, rtol=2e-5)


def test_a_row_that_sees_nothing_is_zero() -> None:
    call = a_call("llama")
    nothing = torch.zeros(1, 1, 9, 9, dtype=torch.bool)
    output, _ = merged(call.seeing(nothing), call.seeing(nothing))
    assert not output.any()


def test_gradients_reach_both_calls() -> None:
    call = a_call("llama")
    query, other = (call.query.clone().requires_grad_() for _ in range(2))
    is_near = (torch.arange(9)[:, None] - torch.arange(9) < 3)[None, None]
    output, _ = merged(call.replace(query=query).seeing(is_near), call.replace(query=other).seeing(~is_near))
    output.square().sum().backward()
    whole = call.query.clone().requires_grad_()
    merged(call.replace(query=whole))[0].square().sum().backward()
    torch.testing.assert_close(query.grad + other.grad, whole.grad, rtol=1e-4, atol=1e-5)
