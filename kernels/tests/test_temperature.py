"""The temperature reference against loops over single numbers in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchattn_kernels import scale_tokens

sizes = st.integers(1, 5)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(max_examples=40, deadline=None)
@given(
    batch=sizes,
    heads=sizes,
    tokens=sizes,
    dim=sizes,
    per_head=st.booleans(),
    shared=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_scale_tokens(batch: int, heads: int, tokens: int, dim: int, per_head: bool, shared: bool, seed: int) -> None:
    states = random(batch, heads, tokens, dim, seed=seed)
    factor = random(1 if shared else batch, tokens, *([heads] if per_head else []), seed=seed + 1)
    scaled = scale_tokens(states, factor)
    assert scaled.shape == states.shape
    for b in range(batch):
        for h in range(heads):
            for t in range(tokens):
                entry = factor[0 if shared else b, t]
                tau = entry[h].item() if per_head else entry.item()
                expected = [tau * x for x in states[b, h, t].tolist()]
                assert scaled[b, h, t].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-30)


@pytest.mark.parametrize("shape", [(2, 3), (1, 3), (2, 3, 4)])
def test_scale_tokens_gradient(shape: tuple[int, ...]) -> None:
    states = random(2, 4, 3, 5, seed=0, dtype=torch.float64).requires_grad_()
    factor = random(*shape, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(scale_tokens, (states, factor))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scale_tokens_keeps_the_dtype(dtype: torch.dtype) -> None:
    assert scale_tokens(torch.ones(1, 2, 3, 4, dtype=dtype), torch.ones(1, 3)).dtype == dtype


def test_a_factor_of_one_changes_nothing() -> None:
    states = random(2, 3, 4, 5, seed=0, dtype=torch.bfloat16)
    assert torch.equal(scale_tokens(states, torch.ones(2, 4)), states)
