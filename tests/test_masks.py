"""Counting visible keys, against looking at every pair."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from patchattn.masks import visible_keys

SIZES = st.integers(1, 6)


def count(allowed) -> list[list[int]]:
    return [[sum(row) for row in rows] for rows in allowed]


def arguments(**given):
    defaults = {"is_causal": True, "base": "sdpa", "window": None, "device": torch.device("cpu")}
    return {**defaults, **given}


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
    assert visible_keys(mask, q_length=rows, kv_length=keys, **arguments()).tolist() == count(allowed)


@given(st.data(), SIZES, SIZES, st.booleans(), st.one_of(st.none(), st.integers(1, 4)))
def test_flash_masks_are_aligned_to_the_last_key(data, rows: int, extra: int, causal: bool, window) -> None:
    keys = rows + extra - 1
    real = data.draw(st.lists(st.booleans(), min_size=keys, max_size=keys))
    offset = keys - rows

    def sees(i: int, j: int) -> bool:
        return real[j] and (not causal or j <= i + offset)

    want = [sum(sees(i, j) for j in range(keys)) for i in range(rows)]
    want = [min(n, window) if window else n for n in want]
    got = visible_keys(
        torch.tensor([real]),
        q_length=rows,
        kv_length=keys,
        **arguments(is_causal=causal, base="flash_attention_2", window=window),
    )
    assert got.tolist() == [want]
    if all(real):
        none = visible_keys(
            None, q_length=rows, kv_length=keys, **arguments(is_causal=causal, base="a/kernel", window=window)
        )
        assert none.tolist() == [want]


def test_no_mask() -> None:
    assert visible_keys(None, q_length=3, kv_length=3, **arguments()).tolist() == [[1, 2, 3]]
    assert visible_keys(None, q_length=3, kv_length=8, **arguments()).tolist() == [[1, 2, 3]]  # an empty static cache
    assert visible_keys(None, q_length=1, kv_length=5, **arguments()).tolist() == [[5]]
    assert visible_keys(None, q_length=2, kv_length=5, **arguments(is_causal=False)).tolist() == [[5, 5]]
    assert visible_keys(None, q_length=2, kv_length=5, **arguments(base="eager")).tolist() == [[5, 5]]


def test_block_masks() -> None:
    mask = create_block_mask(lambda b, h, i, j: (i + 2 >= j) & (b == 0), 2, None, 3, 5, device="cpu")
    assert visible_keys(mask, q_length=3, kv_length=5, **arguments(base="flex_attention")).tolist() == [
        [3, 4, 5],
        [0, 0, 0],
    ]


def test_anything_else_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="Masks of type"):
        visible_keys(torch.ones(1, 2, 3), q_length=2, kv_length=3, **arguments())
