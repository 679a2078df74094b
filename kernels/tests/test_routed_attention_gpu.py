"""`routed_attention` on a GPU: precision, large shapes, determinism, offsets beyond 32 bits, CUDA graphs."""

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from patchattn_kernels import AttentionRule, routed_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

Tensors = list[torch.Tensor]


@pytest.fixture(autouse=True)
def triton_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHATTN_KERNELS", "triton")


def operands(
    batch: int, heads: int, groups: int, queries: int, keys: int, dim: int, *, share: float = 0.5,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensors:  # fmt: skip
    """Query, key, value and gate on the GPU; gates are between 0.5 and 1.5, or closed."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    kept = torch.rand(batch, queries, heads, generator=generator, device="cuda") < share
    gate = (0.5 + torch.rand(batch, queries, heads, generator=generator, device="cuda")) * kept
    states = (batch, heads, queries, dim), (batch, groups, keys, dim), (batch, groups, keys, dim)
    return [*(random(*shape) for shape in states), gate]


def dense(tensors: Tensors, causal: bool, real: torch.Tensor | None = None) -> torch.Tensor:
    """SDPA, gated afterwards, in the dtype of the operands."""
    query, key, value, gate = tensors
    queries, keys = query.shape[2], key.shape[2]
    mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
    if causal:
        mask = mask.tril(keys - queries)
    if real is not None:
        mask = mask & real[:, None, None]
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    return output.nan_to_num(0.0) * gate.transpose(1, 2)[..., None].to(output.dtype)


def results(function: Any, tensors: Tensors, upstream: torch.Tensor) -> Tensors:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(leaves)
    gradients = torch.autograd.grad(output, leaves, upstream.to(output.dtype))
    return [output.detach(), *gradients[:-1], gradients[-1].masked_fill(tensors[-1] == 0, 0.0)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(
    ("shape", "causal", "padded"),
    [
        ((1, 8, 2, 520, 520), True, False),
        ((2, 4, 4, 300, 411), False, True),
        ((2, 8, 2, 1, 1000), True, True),
        ((2, 4, 1, 130, 700), True, True),
    ],
)
def test_errors_are_those_of_torch(
    shape: tuple[int, ...], causal: bool, padded: bool, dim: int, dtype: torch.dtype
) -> None:
    tensors = operands(*shape, dim, dtype=dtype)
    real = None
    if padded:
        real = torch.arange(shape[4], device="cuda") >= torch.tensor([[17], [200]], device="cuda")
    rule = AttentionRule(scaling=dim**-0.5, causal=causal, mask=real)
    upstream = torch.randn(*shape[:2], shape[3], dim, device="cuda")
    mine = results(lambda leaves: routed_attention(*leaves, rule), tensors, upstream)
    theirs = results(lambda leaves: dense(leaves, causal, real), tensors, upstream)
    exact = results(lambda leaves: dense(leaves, causal, real), [t.double() for t in tensors], upstream)
    names = ("output", "query", "key", "value", "gate")
    for name, got, other, wanted in zip(names, mine, theirs, exact, strict=True):
        error, usual = (float((result.double() - wanted).abs().max()) for result in (got, other))
        assert error <= 2 * usual + 1e-5, name


@pytest.mark.parametrize("share", [0.0, 0.25, 1.1])
def test_long_sequences(share: float) -> None:
    tensors = operands(1, 8, 2, 8192, 8192, 128, share=share)
    rule = AttentionRule(scaling=128**-0.5, causal=True)
    upstream = torch.randn(1, 8, 8192, 128, device="cuda")

    def flash(leaves: Tensors) -> torch.Tensor:
        output = scaled_dot_product_attention(*leaves[:3], is_causal=True, enable_gqa=True)
        return output * leaves[3].transpose(1, 2)[..., None].to(output.dtype)

    mine = results(lambda leaves: routed_attention(*leaves, rule), tensors, upstream)
    for got, wanted in zip(mine, results(flash, tensors, upstream), strict=True):
        difference = (got.float() - wanted.float()).norm()
        assert float(difference) <= 0.02 * float(wanted.float().norm())


@pytest.mark.parametrize("shape", [(2, 8, 2, 1000, 1000, 64), (2, 8, 2, 1, 5000, 128)])
def test_a_hundred_runs_give_the_same_bits(shape: tuple[int, ...]) -> None:
    tensors = operands(*shape)
    rule = AttentionRule(scaling=0.1, causal=True)
    upstream = torch.randn(*shape[:2], shape[3], shape[5], device="cuda")
    first = results(lambda leaves: routed_attention(*leaves, rule), tensors, upstream)
    for _ in range(100):
        again = results(lambda leaves: routed_attention(*leaves, rule), tensors, upstream)
        assert all(torch.equal(got, wanted) for got, wanted in zip(again, first, strict=True))


def test_offsets_beyond_32_bits() -> None:
    # the last head of the last sequence lies beyond 2 ** 31 numbers in queries, keys and output
    batch, heads, tokens, dim = 17, 64, 16384, 128
    query = torch.randn(batch, heads, tokens, dim, device="cuda", dtype=torch.bfloat16)
    gate = torch.zeros(batch, tokens, heads, device="cuda")
    gate[:, -300:, -1] = 1.0
    rule = AttentionRule(scaling=0.1, causal=True)
    output = routed_attention(query, query, query, gate, rule)
    last = query[-1:, -1:]
    expected = scaled_dot_product_attention(last, last, last, is_causal=True, scale=0.1)
    torch.testing.assert_close(output[-1, -1, -300:], expected[0, 0, -300:], atol=0.02, rtol=0.02)
    assert not output[-1, -2].any()


@pytest.mark.parametrize("queries", [300, 1])
def test_a_cuda_graph_follows_the_gate(queries: int) -> None:
    query, key, value, gate = operands(1, 8, 2, queries, 600, 64)
    rule = AttentionRule(scaling=0.125, causal=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        routed_attention(query, key, value, gate, rule)  # compiles the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = routed_attention(query, key, value, gate, rule)
    gate.copy_(gate.flip(-1))
    graph.replay()
    torch.testing.assert_close(output, routed_attention(query, key, value, gate, rule), atol=0, rtol=0)


def test_nothing_waits_for_the_device() -> None:
    tensors = [tensor.requires_grad_() for tensor in operands(1, 8, 2, 300, 300, 64)]
    rule = AttentionRule(scaling=0.125, causal=True)
    routed_attention(*tensors, rule).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        routed_attention(*tensors, rule).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
