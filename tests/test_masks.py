"""Masks by base implementation, against looking at every pair."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from patchattn.core.mask import Mask
from patchattn.hosts.transformers.masks import mask_of_call, packed_sequences

SIZES = st.integers(1, 6)


def count(allowed) -> list[list[int]]:
    return [[sum(row) for row in rows] for rows in allowed]


def mask_of(passed: Any, rows: int, keys: int, *, told: dict[str, Any] | None = None, **how: Any) -> Mask:
    sizes = {"batch": 1, "heads": 4, "queries": rows, "keys": keys, "is_cross": False, "device": torch.device("cpu")}
    how = {"is_causal": True, "base": "sdpa", "window": None, **how}
    return mask_of_call(passed, how.pop("base"), told or {}, **sizes, **how)


@given(st.data(), SIZES, SIZES, st.sampled_from([torch.bool, torch.float32, torch.bfloat16]))
def test_dense_masks(data, rows: int, extra: int, dtype: torch.dtype) -> None:
    keys = rows + extra - 1
    allowed = data.draw(
        st.lists(
            st.lists(st.lists(st.booleans(), min_size=keys, max_size=keys), min_size=rows, max_size=rows),
            min_size=1,
            max_size=2,
        )
    )
    mask = torch.tensor(allowed)[:, None]
    if dtype != torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    found = mask_of(mask, rows, keys)
    assert found.counts().tolist() == count(allowed)
    assert found.seen()[:, 0].tolist() == allowed


@given(st.data(), SIZES, SIZES, st.booleans(), st.one_of(st.none(), st.integers(1, 4)))
def test_flash_masks_are_aligned_to_the_last_key(data, rows: int, extra: int, causal: bool, window) -> None:
    keys = rows + extra - 1
    real = data.draw(st.lists(st.booleans(), min_size=keys, max_size=keys))
    offset = keys - rows

    def sees(i: int, j: int) -> bool:
        here = i + offset
        between = sum(real[min(j, here) + 1 : max(j, here) + 1])  # a window is counted in real tokens
        return real[j] and (not causal or j <= here) and (window is None or between < window)

    want = [[sees(i, j) for j in range(keys)] for i in range(rows)]
    how = {"is_causal": causal, "base": "flash_attention_2", "window": window}
    found = mask_of(torch.tensor([real]), rows, keys, **how)
    assert found.seen()[:, 0].tolist() == [want]
    assert found.counts().tolist() == count([want])
    if all(real):
        found = mask_of(None, rows, keys, **{**how, "base": "a/kernel"})
        assert found.seen()[:, 0].tolist() == [want]
        assert found.counts().tolist() == count([want])


@given(st.lists(SIZES, min_size=1, max_size=4), st.booleans(), st.one_of(st.none(), st.integers(1, 4)))
def test_packed_sequences_under_flash_attention(lengths: list[int], causal: bool, window) -> None:
    total, owner = sum(lengths), [i for i, length in enumerate(lengths) for _ in range(length)]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    numbers = torch.cat([torch.arange(length) for length in lengths])[None]

    def sees(i: int, j: int) -> bool:
        return owner[i] == owner[j] and (not causal or j <= i) and (window is None or abs(i - j) < window)

    want = [[sees(i, j) for j in range(total)] for i in range(total)]
    for told in ({"cu_seq_lens_q": ends.int()}, {"position_ids": numbers}):
        found = mask_of(None, total, total, told=told, is_causal=causal, base="flash_attention_2", window=window)
        assert found.counts().tolist() == count([want])
        assert found.seen()[:, 0].tolist() == [want]


def test_only_flash_attention_needs_to_be_told_of_packed_sequences() -> None:
    numbers = torch.tensor([[0, 1, 0]])
    assert packed_sequences(None, "sdpa", {"position_ids": numbers}, 1, 3) is None
    assert packed_sequences(torch.ones(1, 3), "flash_attention_2", {"position_ids": numbers}, 1, 3) is None
    assert packed_sequences(None, "flash_attention_2", {"position_ids": numbers.expand(2, 3)}, 2, 3) is None
    with pytest.raises(NotImplementedError, match="in one row, got 2"):
        packed_sequences(None, "flash_attention_2", {"cu_seq_lens_q": torch.tensor([0, 3, 6])}, 2, 3)


@pytest.mark.parametrize("base", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("rows", "keys"), [(3, 3), (1, 5), (3, 8)])
def test_no_mask_pair_by_pair(base: str, causal: bool, rows: int, keys: int) -> None:
    found = mask_of(None, rows, keys, is_causal=causal, base=base)
    pairs = found.seen()[:, 0]
    assert pairs.sum(-1).tolist() == found.counts().tolist()
    assert all(row[:n].all() for row, n in zip(pairs[0], pairs[0].sum(-1), strict=True))  # no key skipped


def test_no_mask() -> None:
    assert mask_of(None, 3, 3).counts().tolist() == [[1, 2, 3]]
    assert mask_of(None, 3, 8).counts().tolist() == [[1, 2, 3]]  # an empty static cache
    assert mask_of(None, 1, 5).counts().tolist() == [[5]]
    assert mask_of(None, 2, 5, is_causal=False).counts().tolist() == [[5, 5]]
    assert mask_of(None, 2, 5, base="eager").counts().tolist() == [[5, 5]]


def test_block_masks() -> None:
    mask = create_block_mask(lambda b, h, i, j: (i + 2 >= j) & (b == 0), 2, None, 3, 5, device="cpu")
    found = mask_of(mask, 3, 5, base="flex_attention")
    assert found.seen()[0, 0].tolist() == [[True] * 3 + [False] * 2, [True] * 4 + [False], [True] * 5]
    assert found.counts().tolist() == [[3, 4, 5], [0, 0, 0]]
