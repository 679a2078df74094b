"""Routed attention of more queries than a tile holds, behind many keys: tile by tile, each by several programs."""

from typing import Any

import pytest
import torch

from patchattn_kernels import AttentionRule, routed_attention_triton

from .test_routed_attention import check, operands, padding, poisoned, random_mask, small_tiles  # noqa: F401

H200 = 132  # processors


@pytest.fixture
def tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tiles of 16 pairs, 40 keys are many, and nothing may go the other way. Queries of each launch are noted."""
    seen, decode = [], routed_attention_triton._decode_all

    def noted(query: torch.Tensor, *rest: Any) -> Any:
        seen.append(query.shape[2])
        return decode(query, *rest)

    monkeypatch.setattr(routed_attention_triton, "FEW_PAIRS", 16)
    monkeypatch.setattr(routed_attention_triton, "LONG", 40)
    monkeypatch.setattr(routed_attention_triton, "processors", lambda *_: H200)
    monkeypatch.setattr(routed_attention_triton, "_decode_all", noted)
    monkeypatch.setattr(routed_attention_triton, "_prefill_all", None)
    return seen


CASES: dict[str, dict[str, Any]] = {
    "causal, own keys in the middle": {"causal": True, "offset": 13},
    "window": {"causal": True, "window": 9},
    "padding": {"causal": True, "mask": padding(48, 31, keys=48)},
    "a row per query": {"mask": random_mask(2, 19, 48)},
}


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(case: str, tile_by_tile: list[int]) -> None:
    check(operands(batch=2, queries=19, keys=48, share=0.4, seed=5), AttentionRule(scaling=0.25, **CASES[case]))
    assert tile_by_tile == [8, 8, 3]


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "at_a_time"),
    [
        (1, 1, 100, 1),
        (1, 16, 100, 16),  # 64 pairs are one tile
        (1, 17, 32_768, 16),
        (1, 128, 32_768, 16),  # 8 tiles of 8 kv heads, on half of the processors
        (1, 129, 32_768, 0),
        (4, 32, 32_768, 16),
        (8, 32, 32_768, 0),
        (1, 32, 2047, 0),
        (1, 32_768, 32_768, 0),
    ],
)
def test_what_is_shared_out(
    batch: int, queries: int, keys: int, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Llama 3's 32 query heads and 8 kv heads: only where one program per tile would leave half of a GPU idle."""
    monkeypatch.setattr(routed_attention_triton, "processors", lambda *_: H200)
    gate, value = torch.empty(batch, queries, 32, device="meta"), torch.empty(batch, 8, keys, 128, device="meta")
    assert routed_attention_triton._queries_at_a_time(gate, value) == at_a_time
