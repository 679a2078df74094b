"""`block_sparse_attention` on a GPU: precision, large shapes, determinism, offsets beyond 32 bits, CUDA graphs."""

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from patchattn_kernels import (
    AttentionRule,
    BlockLists,
    SinkAndRecent,
    block_sparse_attention,
    lists_from_mask,
    seen_blocks,
    sink_and_recent,
)
from patchattn_kernels.block_sparse_attention_cpu import selected

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

Tensors = list[torch.Tensor]


@pytest.fixture(autouse=True)
def triton_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHATTN_KERNELS", "triton")


def operands(
    batch: int, heads: int, groups: int, queries: int, keys: int, dim: int, dtype: torch.dtype = torch.bfloat16
) -> Tensors:
    generator = torch.Generator("cuda").manual_seed(0)
    states = (batch, heads, queries, dim), (batch, groups, keys, dim), (batch, groups, keys, dim)
    return [torch.randn(*shape, generator=generator, device="cuda").to(dtype) for shape in states]


def kept(kind: str, tensors: Tensors, rule: AttentionRule) -> SinkAndRecent | BlockLists:
    """Windows whose sizes differ between heads, or half of the blocks that are seen."""
    batch, heads, queries, _ = tensors[0].shape
    keys = tensors[1].shape[2]
    if kind == "window":
        recent = [1 + 50 * head if head % 4 < 3 else None for head in range(heads)]
        return sink_and_recent([13 * (head % 5) for head in range(heads)], recent, heads, device="cuda")
    sizes = {"queries": queries, "keys": keys, "block_q": 64, "block_k": 64, "device": torch.device("cuda")}
    seen = seen_blocks(rule, **sizes).expand(batch, heads, -1, -1)
    generator = torch.Generator("cuda").manual_seed(1)
    return lists_from_mask(seen & (torch.rand(seen.shape, generator=generator, device="cuda") < 0.5), 64, 64)


def results(function: Any, tensors: Tensors, upstream: torch.Tensor) -> Tensors:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output.dtype))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("kind", ["window", "lists"])
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
    shape: tuple[int, ...], causal: bool, padded: bool, kind: str, dim: int, dtype: torch.dtype
) -> None:
    tensors = operands(*shape, dim, dtype)
    real = None
    if padded:
        real = torch.arange(shape[4], device="cuda") >= torch.tensor([[17], [200]], device="cuda")
    rule = AttentionRule(scaling=dim**-0.5, causal=causal, mask=real)
    keep = kept(kind, tensors, rule)
    rows = slice(0, shape[3])
    seen = selected(keep, rule, rows, shape[3:], real.device if real is not None else torch.device("cuda"))
    seen = seen & rule.visible(rows, shape[3:], torch.device("cuda"))[:, None]
    upstream = torch.randn(*shape[:2], shape[3], dim, device="cuda")

    def dense(leaves: Tensors) -> torch.Tensor:
        output = scaled_dot_product_attention(*leaves, attn_mask=seen, enable_gqa=True)
        return output.masked_fill(~seen.any(-1)[..., None], 0.0)

    mine = results(lambda leaves: block_sparse_attention(*leaves, keep, rule), tensors, upstream)
    theirs = results(dense, tensors, upstream)
    exact = results(dense, [tensor.double() for tensor in tensors], upstream)
    for name, got, other, wanted in zip(("output", "query", "key", "value"), mine, theirs, exact, strict=True):
        error, usual = ((result.double() - wanted).abs().max().item() for result in (got, other.nan_to_num(0.0)))
        assert error <= 2 * usual + 1e-5, name


@pytest.mark.parametrize("kind", ["window", "lists"])
def test_long_sequences_and_equal_bits(kind: str) -> None:
    tensors = operands(1, 8, 2, 8192, 8192, 128)
    rule = AttentionRule(scaling=128**-0.5, causal=True)
    keep = kept(kind, tensors, rule)
    upstream = torch.randn(1, 8, 8192, 128, device="cuda")
    first = results(lambda leaves: block_sparse_attention(*leaves, keep, rule), tensors, upstream)
    for _ in range(100):
        again = results(lambda leaves: block_sparse_attention(*leaves, keep, rule), tensors, upstream)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    wanted = first[0].new_empty(1, 8, 64, 128)
    rows = slice(8100, 8164)
    seen = selected(keep, rule, rows, (8192, 8192), torch.device("cuda"))
    seen = seen & rule.visible(rows, (8192, 8192), torch.device("cuda"))[:, None]
    part = [tensors[0][:, :, rows], *tensors[1:]]
    wanted = scaled_dot_product_attention(*(t.double() for t in part), attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(first[0][:, :, rows].double(), wanted, atol=2e-2, rtol=2e-2)


def test_offsets_beyond_32_bits() -> None:
    query, key, value = operands(1, 1, 1, 16, 2**24 + 300, 128)  # 2^31 numbers of keys and more
    rule = AttentionRule(scaling=128**-0.5, causal=True)
    output = block_sparse_attention(query, key, value, sink_and_recent(4, 200, 1, device="cuda"), rule)
    own = torch.arange(16, device="cuda")[:, None] + key.shape[2] - 16
    places = torch.cat([torch.arange(4, device="cuda"), torch.arange(key.shape[2] - 300, key.shape[2], device="cuda")])
    seen = (places <= own) & ((places < 4) | (own - places < 200))
    some = (query.double(), key[:, :, places].double(), value[:, :, places].double())
    torch.testing.assert_close(
        output.double(), scaled_dot_product_attention(*some, attn_mask=seen), atol=2e-2, rtol=2e-2
    )


@pytest.mark.parametrize("kind", ["window", "lists"])
def test_decoding_in_a_cuda_graph(kind: str) -> None:
    tensors = operands(2, 8, 2, 1, 4096, 128)
    rule = AttentionRule(scaling=128**-0.5, causal=True)
    keep = kept(kind, tensors, rule)
    expected = block_sparse_attention(*tensors, keep, rule)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = block_sparse_attention(*tensors, keep, rule)
    output.zero_()
    graph.replay()
    assert torch.equal(output, expected)


def test_compiled_by_inductor() -> None:
    tensors = operands(1, 8, 2, 256, 256, 64)
    rule = AttentionRule(scaling=0.125, causal=True)
    keep = kept("window", tensors, rule)
    compiled = torch.compile(lambda *leaves: block_sparse_attention(*leaves, keep, rule) * 2, fullgraph=True)
    assert torch.equal(compiled(*tensors), block_sparse_attention(*tensors, keep, rule) * 2)
