"""What block-sparse attention reads of keys and values, and what it refuses."""

from typing import Any

import pytest
import torch

from patchattn_kernels import (
    AttentionRule,
    block_sparse_attention,
    block_sparse_attention_triton,
    lists_from_mask,
    sink_and_recent,
)
from patchattn_kernels.tuning import Launch


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that a few tokens fill several."""
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is for machines without a GPU; test_block_sparse_attention_gpu.py runs here")
    monkeypatch.setattr(block_sparse_attention_triton, "launches", lambda *_: [Launch({"BLOCK_M": 16, "BLOCK_N": 16})])


def operands(heads: int = 4, groups: int = 2, queries: int = 33, keys: int = 41) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (1, heads, queries, 16), (1, groups, keys, 16), (1, groups, keys, 16)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("kind", ["window", "lists"])
def test_work_is_that_of_the_kept_tiles(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHATTN_KERNELS", "triton")
    loads = 0
    load = block_sparse_attention_triton.rows_of

    def counting(*arguments: Any) -> Any:
        nonlocal loads
        loads += 1
        return load(*arguments)

    monkeypatch.setattr(block_sparse_attention_triton, "rows_of", counting)
    tensors = operands(heads=1, groups=1, queries=160, keys=160)
    if kind == "window":  # tiles of 16: one of sinks and two of recent keys, where the queries come after them
        block_sparse_attention(*tensors, sink_and_recent(16, 17, 1), AttentionRule(0.25, causal=True))
        tiles = 1 + 2 + 8 * 3
    else:
        chosen = torch.zeros(1, 1, 10, 10, dtype=torch.bool)
        chosen[..., 3], chosen[..., 4, 7] = True, True
        block_sparse_attention(*tensors, lists_from_mask(chosen, 16, 16), AttentionRule(0.25))
        tiles = 11
    assert loads == 10 + 2 * tiles  # queries once; keys and values of every tile


def test_mistakes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = operands()
    rule, keep = AttentionRule(0.25), sink_and_recent(1, 4, 4)
    with pytest.raises(ValueError, match="H a multiple of G"):
        block_sparse_attention(query[:, :3], key, value, keep, rule)
    with pytest.raises(ValueError, match="of 4 heads"):
        block_sparse_attention(query, key, value, sink_and_recent(1, 4, 3), rule)
    with pytest.raises(ValueError, match=r"AttentionRule\.offset"):
        block_sparse_attention(query, key[:, :, :9], value[:, :, :9], keep, rule)
    with pytest.raises(ValueError, match="for 33 queries"):
        block_sparse_attention(query, key, value, lists_from_mask(torch.ones(1, 1, 2, 3) > 0, 16, 16), rule)
    lists = lists_from_mask(torch.ones(1, 1, 3, 3) > 0, 16, 16)
    with pytest.raises(ValueError, match="counts"):
        block_sparse_attention(query, key, value, lists._replace(counts=lists.counts[:, :, :1]), rule)
    monkeypatch.setenv("PATCHATTN_KERNELS", "triton")
    with pytest.raises(NotImplementedError, match="softcap"):
        block_sparse_attention(query, key, value, keep, AttentionRule(0.25, softcap=2.0))
    with pytest.raises(NotImplementedError, match="packed"):
        block_sparse_attention(query, key, value, keep, AttentionRule(0.25, sequence=torch.zeros(41).long()))
    with pytest.raises(NotImplementedError, match="powers of two"):
        block_sparse_attention(query, key, value, lists_from_mask(torch.ones(1, 1, 3, 5) > 0, 16, 9), rule)
    with pytest.raises(NotImplementedError, match="float64"):
        block_sparse_attention(query.double(), key.double(), value.double(), keep, rule)
