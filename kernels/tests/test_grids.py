"""Grids of launches: a GPU takes no more than 65,535 programs along the second and third axis."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from patchattn_kernels import (
    AttentionRule,
    block_sparse_attention,
    block_sparse_attention_backward_triton,
    block_sparse_attention_triton,
    lists_from_mask,
    sink_and_recent,
)

LINES, ROWS, DIM, BLOCK = 70_000, 3, 4, 16


class Recorded:
    """Stands for a kernel: keeps the grids that it is launched with, and computes nothing."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.grids.append(grid)
        return lambda *_, **__: None


@pytest.mark.parametrize("listed", [False, True])
def test_block_sparse_launches_have_one_long_axis(monkeypatch: pytest.MonkeyPatch, listed: bool) -> None:
    monkeypatch.setenv("PATCHATTN_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernels = {"attend": block_sparse_attention_triton} | dict.fromkeys(
        ("deltas", "query_gradients", "key_gradients"), block_sparse_attention_backward_triton
    )
    recorded = {name: Recorded() for name in (*kernels, "merge")}
    for name, module in kernels.items():
        monkeypatch.setattr(module, name, recorded[name])
    monkeypatch.setattr(block_sparse_attention_triton, "merge", recorded["merge"])
    monkeypatch.setattr(block_sparse_attention_triton, "shares", lambda *_: 2)
    states = [torch.zeros(LINES, 1, ROWS, DIM, requires_grad=True) for _ in range(3)]
    keep: Any = sink_and_recent(1, 2, 1)
    if listed:
        keep = lists_from_mask(torch.ones(1, 1, 1, 1, dtype=torch.bool), BLOCK, BLOCK)
    output = block_sparse_attention(*states, keep, AttentionRule(1.0, causal=True))
    output.backward(torch.zeros_like(output))
    for name, kernel in recorded.items():
        assert kernel.grids, name
        for grid in kernel.grids:
            assert grid[0] >= LINES, name
            assert max(grid[1:], default=1) <= 65_535, name
