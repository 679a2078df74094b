"""Heads with sinks and recent keys by slices, against float64 and pair by pair."""

import math
from typing import Any

import pytest
import torch

from patchattn_kernels import (
    AttentionRule,
    block_sparse_attention,
    dense_attention_cpu,
    sink_and_recent,
    sink_and_recent_cpu,
)
from patchattn_kernels.block_lists import SinkAndRecent

UNBOUNDED = [(0, 2**30), (3, 5), (2**30, 0), (0, 0)]
ALIKE, GROUPED, MIXED = [(3, 5)] * 4, [(3, 5)] * 2 + [(0, 9)] * 2, [(3, 5), (0, 4), (30, 30), (6, 1)]


def attend(sizes: list[tuple[int, int]], queries: int, keys: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Output and log-sum-exp by the operation, and the same in float64 from the definition."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((4, queries, 8), (2, keys, 8), (2, keys, 6))
    query, key, value = (torch.randn(2, *shape, generator=generator, dtype=dtype) for shape in shapes)
    keep = SinkAndRecent(*torch.tensor(sizes, dtype=torch.int32).T, max(size[0] for size in sizes))
    before = [tensor.clone() for tensor in (query, key, value)]
    got = block_sparse_attention(query, key, value, keep, AttentionRule(0.7, causal=True), return_lse=True)
    assert all(map(torch.equal, before, (query, key, value))), "sinks are copied over copies"
    seen = torch.zeros(4, queries, keys, dtype=torch.bool)
    for h, (sinks, recent) in enumerate(sizes):
        for i in range(queries):
            own = keys - queries + i
            for j in range(own + 1):
                seen[h, i, j] = j < sinks or own - j < recent
    key, value = (tensor.double().repeat_interleave(2, dim=1) for tensor in (key, value))
    logits = (query.double() @ key.mT * 0.7).masked_fill(~seen, -math.inf)
    some = seen.any(-1)[..., None]
    weights = logits.masked_fill(~some, 0.0).softmax(-1) * some
    return *got, weights @ value, logits.logsumexp(-1)


@pytest.mark.parametrize("rows", [1, 4, 64])
@pytest.mark.parametrize("queries", [40, 13, 1])
@pytest.mark.parametrize(
    "sizes", [ALIKE, GROUPED, MIXED, UNBOUNDED, [(0, 1)] * 4, [(2, 0)] * 4, [(0, 0)] * 4, [(40, 1)] * 4]
)
def test_output(sizes: list[tuple[int, int]], queries: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink_and_recent_cpu, "ROWS", rows)
    monkeypatch.setattr(sink_and_recent_cpu, "MORE_ROWS", 9)
    output, lse, wanted, exact = attend(sizes, queries, 40, torch.float64)
    torch.testing.assert_close(output, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_other_dtypes(dtype: torch.dtype, error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink_and_recent_cpu, "ROWS", 8)
    output, lse, wanted, exact = attend(MIXED, 40, 40, dtype)
    assert output.dtype == dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(output.double(), wanted, rtol=error, atol=error)
    torch.testing.assert_close(lse.double(), exact, rtol=error, atol=error)


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool]]:
    """Queries and keys of every call of torch's kernel, and whether it is causal."""
    calls, flash = [], dense_attention_cpu._flash

    def called(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, p: float, causal: bool, **how: Any) -> Any:
        calls.append((query.shape[2], key.shape[2], causal))
        return flash(query, key, value, p, causal, **how)

    monkeypatch.setattr(dense_attention_cpu, "_flash", called)
    return calls


@pytest.mark.parametrize("sizes", [(100, 200), (0, 1024), (64, 960)])
def test_windows_as_long_as_the_sequence_are_dense_attention(sizes: tuple[int, int], pairs: Any) -> None:
    query = torch.randn(1, 2, 300, 8)
    block_sparse_attention(query, query, query, sink_and_recent(*sizes, heads=2), AttentionRule(1.0, causal=True))
    assert pairs == [(300, 300, True)]


def test_fewer_pairs_than_dense_attention_from_a_thousand_tokens_on(pairs: Any) -> None:
    """64 sinks and 256 recent keys: what is computed beside the pairs that are seen is less than what is left out."""
    query = torch.randn(1, 1, 1024, 8)
    block_sparse_attention(query, query, query, sink_and_recent(64, 256, heads=1), AttentionRule(1.0, causal=True))
    computed = sum(rows * (rows + 1) // 2 if causal else rows * keys for rows, keys, causal in pairs)
    assert computed < 0.9 * 1024 * 1025 / 2


def test_decoding_reads_the_window_alone(pairs: Any) -> None:
    query, key = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 5000, 8)
    block_sparse_attention(query, key, key, sink_and_recent(64, 256, heads=2), AttentionRule(1.0, causal=True))
    assert pairs == [(1, 64 + 256, False)]


@pytest.mark.parametrize(("sinks", "rows", "copied"), [(0, 700, False), (64, 600, False), (64, 700, True)])
def test_keys_are_copied_only_where_sinks_lie_far_before_the_window(
    sinks: int, rows: int, copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last block's window begins 47 or 147 keys behind the sinks: more than GAP are not computed in vain."""
    monkeypatch.setattr(sink_and_recent_cpu, "MORE_ROWS", 190)
    monkeypatch.setattr(sink_and_recent_cpu, "GAP", 100)
    read, flash = set(), dense_attention_cpu._flash

    def called(query: torch.Tensor, key: torch.Tensor, *rest: Any, **how: Any) -> Any:
        read.add(key.untyped_storage().data_ptr())
        return flash(query, key, *rest, **how)

    monkeypatch.setattr(dense_attention_cpu, "_flash", called)
    query, key = torch.randn(1, 2, rows, 8), torch.randn(1, 2, rows, 8)
    before = key.clone()
    block_sparse_attention(query, key, key, sink_and_recent(sinks, 300, heads=2), AttentionRule(1.0, causal=True))
    assert (read == {key.untyped_storage().data_ptr()}) is not copied
    assert torch.equal(key, before)


@pytest.mark.parametrize("how", [{"mask": torch.ones(1, 30, dtype=torch.bool)}, {"window": 8}, {"causal": False}])
def test_other_rules_are_left_to_gathering(how: dict[str, Any]) -> None:
    rule = AttentionRule(**{"scaling": 1.0, "causal": True, **how})
    assert not sink_and_recent_cpu.in_slices(rule, torch.device("cpu"))
