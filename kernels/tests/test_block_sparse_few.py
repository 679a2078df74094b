"""Block-sparse attention of few queries: those of several query heads share a tile, by Triton's interpreter."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from patchattn_kernels import (
    AttentionRule,
    BlockLists,
    SinkAndRecent,
    block_sparse_attention,
    block_sparse_attention_triton,
    lists_from_mask,
    sink_and_recent,
)
from patchattn_kernels.tuning import Launch

from .test_block_sparse_attention import dense, left_padding, operands, shown


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles so small that a few tokens fill several; memory that nothing was written to is NaN."""
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is for machines without a GPU")
    monkeypatch.setenv("PATCHATTN_KERNELS", "triton")
    monkeypatch.setattr(block_sparse_attention_triton, "launches", lambda *_: [Launch({"BLOCK_M": 16, "BLOCK_N": 16})])
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


CASES: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {  # query heads, kv heads, queries; a rule
    "causal": ((6, 2, 1), {"causal": True}),
    "window over padding": ((6, 2, 7), {"causal": True, "window": 25, "mask": left_padding(30, 0, keys=60)}),
    "bidirectional, a part of a large group": ((18, 1, 1), {"offset": 20}),
}


def check(tensors: list[torch.Tensor], keep: SinkAndRecent | BlockLists, rule: AttentionRule) -> None:
    got = block_sparse_attention(*tensors, keep, rule, return_lse=True)
    for mine, exact in zip(got, dense(tensors, rule, shown(keep, rule, tensors)), strict=True):
        torch.testing.assert_close(mine.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_windows_that_differ_between_heads_of_a_tile(name: str) -> None:
    (heads, groups, queries), rule = CASES[name]
    sinks = [[0, 30, 3, 17, 1, 9][head % 6] for head in range(heads)]
    recent = [[9, 1, 17, None, 30, 3][head % 6] for head in range(heads)]
    tensors = operands(2, heads, groups, queries, 60, 8, 4)
    check(tensors, sink_and_recent(sinks, recent, heads), AttentionRule(0.3, **rule))


@pytest.mark.parametrize(("queries", "block_q"), [(1, 64), (7, 4), (7, 1)])
def test_lists_that_heads_share(queries: int, block_q: int) -> None:
    """Those of two sequences differ; some blocks of queries read nothing."""
    chosen = torch.rand(2, 1, -(-queries // block_q), 4, generator=torch.Generator().manual_seed(3)) < 0.4
    tensors = operands(2, 6, 2, queries, 60, 8, 4)
    check(tensors, lists_from_mask(chosen, block_q, 16), AttentionRule(0.3, causal=True))


@pytest.mark.parametrize(
    ("heads", "queries", "kind", "programs"),
    [
        (4, 1, "windows", 2),  # one per kv head
        (4, 16, "windows", 4),  # 8 queries of 2 heads
        (4, 17, "windows", 8),  # no longer decoding: a head's queries fill tiles
        (4, 1, "shared lists", 2),
        (4, 1, "lists", 4),
        (64, 1, "windows", 4),  # 16 of 32 heads
    ],
)
def test_keys_are_read_once_for_the_heads_that_share_them(
    heads: int, queries: int, kind: str, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loads of keys and values, where every program goes through two tiles of them, and no program through a part."""
    loads = 0
    load = block_sparse_attention_triton.rows_of

    def counting(base: Any, rows: Any, stride: Any, *rest: Any) -> Any:
        nonlocal loads
        loads += 1
        return load(base, rows, stride, *rest)

    monkeypatch.setattr(block_sparse_attention_triton, "rows_of", counting)
    monkeypatch.setattr(block_sparse_attention_triton, "shares", lambda *_: 1)
    keep: Any = sink_and_recent(0, 100, heads)
    if kind != "windows":
        chosen = torch.ones(1, heads if kind == "lists" else 1, 1, 2, dtype=torch.bool)
        keep = lists_from_mask(chosen, 16, 16)
    block_sparse_attention(*operands(1, heads, 2, queries, 32), keep, AttentionRule(0.3))
    assert loads == programs * (1 + 2 * 2)
