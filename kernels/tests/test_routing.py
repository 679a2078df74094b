"""The routing references against loops over single numbers in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchattn_kernels import apply_head_gate, head_norms, normalized_scores, select_top_k, straight_through

sizes = st.integers(1, 5)
seeds = st.integers(0, 2**16)
few = settings(max_examples=25, deadline=None)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@few
@given(batch=sizes, heads=sizes, tokens=sizes, dim=sizes, seed=seeds)
def test_head_norms(batch: int, heads: int, tokens: int, dim: int, seed: int) -> None:
    query = random(batch, heads, tokens, dim, seed=seed)
    norms = head_norms(query)
    assert norms.shape == (batch, tokens, heads)
    for b in range(batch):
        for h in range(heads):
            for t in range(tokens):
                expected = math.sqrt(sum(x * x for x in query[b, h, t].tolist()))
                assert norms[b, t, h].item() == pytest.approx(expected, rel=1e-6)


def test_head_norms_do_not_overflow_in_half_precision() -> None:
    query = torch.full((1, 1, 1, 64), 300.0, dtype=torch.float16)  # 64 * 300 ** 2 is beyond float16
    norms = head_norms(query)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, torch.full((1, 1, 1), 2400.0))


def test_head_norms_keep_double_precision() -> None:
    query = random(2, 3, 4, 5, seed=0, dtype=torch.float64)
    torch.testing.assert_close(head_norms(query), (query**2).sum(-1).sqrt().transpose(1, 2), rtol=1e-14, atol=0)


@few
@given(batch=sizes, tokens=sizes, heads=st.integers(2, 8), seed=seeds)
def test_normalized_scores(batch: int, tokens: int, heads: int, seed: int) -> None:
    norms = random(batch, tokens, heads, seed=seed).abs()
    scores = normalized_scores(norms)
    for b in range(batch):
        for t in range(tokens):
            row = norms[b, t].tolist()
            mean = sum(row) / heads
            std = math.sqrt(sum((x - mean) ** 2 for x in row) / (heads - 1))
            powers = [math.exp((x - max(row)) / std) for x in row]
            expected = [power / sum(powers) for power in powers]
            assert scores[b, t].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("heads", [1, 2, 7])
def test_equal_norms_have_uniform_scores_and_finite_gradients(heads: int) -> None:
    norms = torch.full((2, 3, heads), 1.7, requires_grad=True)
    scores = normalized_scores(norms)
    torch.testing.assert_close(scores, torch.full_like(scores, 1 / heads))
    if scores.requires_grad:  # one head has no choice, so there is nothing to learn from
        (scores * torch.arange(1.0, heads + 1)).sum().backward()
        assert norms.grad is not None
        assert norms.grad.isfinite().all()


def test_rows_with_equal_norms_do_not_spoil_the_others() -> None:
    norms = torch.tensor([[[1.0, 1.0, 1.0], [1.0, 2.0, 4.0]]], requires_grad=True)
    normalized_scores(norms)[0, :, 0].sum().backward()
    assert norms.grad is not None
    assert norms.grad.isfinite().all()
    assert norms.grad[0, 1].abs().sum() > 0


def test_normalized_scores_gradient() -> None:
    norms = random(2, 3, 5, seed=0, dtype=torch.float64).abs().requires_grad_()
    assert torch.autograd.gradcheck(normalized_scores, norms)


@few
@given(batch=sizes, tokens=sizes, heads=st.integers(1, 8), data=st.data(), seed=seeds)
def test_select_top_k(batch: int, tokens: int, heads: int, data: st.DataObject, seed: int) -> None:
    k = data.draw(st.integers(0, heads))
    scores = random(batch, tokens, heads, seed=seed)
    mask = select_top_k(scores, k)
    assert mask.dtype == scores.dtype
    for b in range(batch):
        for t in range(tokens):
            row = scores[b, t].tolist()
            best = sorted(range(heads), key=lambda i: -row[i])[:k]
            assert mask[b, t].tolist() == [1.0 if i in best else 0.0 for i in range(heads)]


def test_select_top_k_keeps_k_of_equal_scores() -> None:
    assert select_top_k(torch.zeros(4, 6), 2).sum(-1).tolist() == [2.0] * 4


@few
@given(tokens=sizes, heads=st.integers(2, 8), seed=seeds)
def test_straight_through_has_the_mask_s_value_and_the_scores_gradient(tokens: int, heads: int, seed: int) -> None:
    open_gate = torch.zeros(1, tokens, heads).requires_grad_()
    closed = select_top_k(random(1, tokens, heads, seed=seed), heads // 2)
    gate = straight_through(closed, open_gate, through_closed=True)
    gate.backward(random(1, tokens, heads, seed=seed + 1))
    assert torch.equal(gate, closed)
    assert torch.equal(open_gate.grad, random(1, tokens, heads, seed=seed + 1))

    scores = random(1, tokens, heads, seed=seed).softmax(-1)
    mask = select_top_k(scores, heads // 2)
    upstream = random(1, tokens, heads, seed=seed + 1)

    hard = scores.clone().requires_grad_()
    gate = straight_through(mask, hard)
    gate.backward(upstream)
    soft = scores.clone().requires_grad_()
    (mask * soft).backward(upstream)

    assert torch.equal(gate, mask)
    assert hard.grad is not None
    assert soft.grad is not None
    assert torch.equal(hard.grad, soft.grad)


@few
@given(batch=sizes, tokens=sizes, heads=sizes, dim=sizes, seed=seeds)
def test_apply_head_gate(batch: int, tokens: int, heads: int, dim: int, seed: int) -> None:
    output = random(batch, tokens, heads, dim, seed=seed)
    gate = random(batch, tokens, heads, seed=seed + 1).relu()
    gated = apply_head_gate(output, gate)
    for b in range(batch):
        for t in range(tokens):
            for h in range(heads):
                expected = [gate[b, t, h].item() * x for x in output[b, t, h].tolist()]
                assert gated[b, t, h].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-30)


def test_apply_head_gate_gradient() -> None:
    output = random(2, 3, 4, 5, seed=0, dtype=torch.float64).requires_grad_()
    gate = (random(2, 3, 4, seed=1, dtype=torch.float64).abs() + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(apply_head_gate, (output, gate))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_closed_gate_hides_what_is_not_finite(bad: float) -> None:
    output = torch.ones(1, 2, 2, 3)
    output[0, 0, 1] = bad
    output.requires_grad_()
    gate = torch.tensor([[[1.0, 0.0], [2.0, 0.5]]], requires_grad=True)
    gated = apply_head_gate(output, gate)
    assert torch.equal(gated[0, 0, 1], torch.zeros(3))
    gated.sum().backward()
    assert output.grad is not None
    assert gate.grad is not None
    assert output.grad.isfinite().all()
    assert gate.grad.isfinite().all()
    assert torch.equal(output.grad[0, 0, 1], torch.zeros(3))
    assert torch.equal(gate.grad, torch.tensor([[[3.0, 0.0], [3.0, 3.0]]]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 5.0])
def test_closed_gate_gets_the_gradient_of_what_it_removes(bad: float) -> None:
    output = random(1, 2, 2, 3, seed=0, dtype=torch.float64)
    output[0, 0, 1, 1] = bad
    output.requires_grad_()
    gate = torch.tensor([[[1.0, 0.0], [2.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    upstream = random(1, 2, 2, 3, seed=1, dtype=torch.float64)
    gated = apply_head_gate(output, gate, through_closed=True)
    assert torch.equal(gated[:, :, 1], torch.zeros(1, 2, 3, dtype=torch.float64))
    gated.backward(upstream)
    for t in range(2):
        for h in range(2):
            pairs = zip(upstream[0, t, h].tolist(), output[0, t, h].tolist(), strict=True)
            expected = sum(up * x for up, x in pairs if math.isfinite(x))
            assert gate.grad[0, t, h].item() == pytest.approx(expected)
            assert output.grad[0, t, h].tolist() == pytest.approx((upstream[0, t, h] * gate[0, t, h]).tolist())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_apply_head_gate_keeps_the_output_s_dtype(dtype: torch.dtype) -> None:
    assert apply_head_gate(torch.ones(1, 2, 3, 4, dtype=dtype), torch.ones(1, 2, 3)).dtype == dtype
