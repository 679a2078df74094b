"""Triton's kernels of `column_mass` and `key_counts`."""

# mypy: disable-error-code="no-untyped-def"
import functools
from typing import Any

import torch
import triton
import triton.language as tl

from .backend import on_device, rowwise
from .column_mass_few_triton import are_few, column_mass_few
from .key_mask import KeyMask
from .split_attention_launch import launch, mask_arguments, sizes_of, strides_of
from .split_attention_tiles_triton import full_queries, load_lse, load_rows, query_range, seen
from .tiles import VARYING, key_range
from .tuning import Launch, settings


@triton.jit
def _add_queries(
    total,
    keys_tile,
    query,
    lse,
    real,
    query_token,
    real_row,
    columns,
    start,
    end,
    queries,
    keys,
    mask,
    mask_row,
    mask_column,
    offset,
    window,
    scale,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    MASKED: tl.constexpr,
    PER_ROW: tl.constexpr,
    PADDED: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    for begin in range(start, end, BLOCK_M):
        rows = begin + tl.arange(0, BLOCK_M)
        tile = load_rows(query, rows, queries, query_token, DIM, BLOCK_D, FULL)
        base = load_lse(lse, rows, queries)
        if PADDED:
            counts = tl.load(real + rows * real_row, mask=rows < queries, other=0) != 0
            base = tl.where(counts, base, float("inf"))
        logits = tl.dot(keys_tile, tl.trans(tile), input_precision="ieee")
        powers = tl.exp2(logits * scale - base[None, :])
        if not FULL:
            allowed = seen(
                rows[None, :], columns[:, None], queries, keys, mask, mask_row, mask_column, offset, window,
                CAUSAL, WINDOWED, MASKED, PER_ROW,
            )  # fmt: skip
            powers = tl.where(allowed, powers, 0.0)
        total += tl.sum(powers, axis=1)
    return total


@triton.jit(do_not_specialize=VARYING)
def column_mass_kernel(
    query,
    key,
    lse,
    real,
    mass,
    mask,
    first,
    last,
    query_batch,
    query_head,
    query_token,
    key_batch,
    key_head,
    key_token,
    real_batch,
    real_row,
    mask_batch,
    mask_row,
    mask_column,
    bound_batch,
    bound_row,
    heads,
    group,
    queries,
    keys,
    offset,
    window,
    scale,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    MASKED: tl.constexpr,
    PER_ROW: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (batch, query head, block of keys): what the keys get from all queries that see them.

    Keys are the rows of its tiles, so that a sum over queries stays within a row, as in flash attention.
    """
    count = tl.cdiv(keys, BLOCK_N)
    block = tl.program_id(0) % count  # causal: the first ones are seen by most
    place = (tl.program_id(0) // count).to(tl.int64)
    batch = place // heads
    head = place % heads
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head // group * key_head
    lse += place * queries
    real += batch * real_batch
    mask += batch * mask_batch
    first += batch * bound_batch
    last += batch * bound_batch

    low = block * BLOCK_N
    high = low + BLOCK_N - 1
    columns = low + tl.arange(0, BLOCK_N)
    start, end = query_range(
        low, tl.minimum(high, keys - 1), queries, first, last, bound_row, offset, window, CAUSAL, WINDOWED, MASKED
    )  # fmt: skip
    begins, ends = full_queries(
        low, high, start, end, keys, queries, offset, window, CAUSAL, WINDOWED, MASKED, BLOCK_M
    )  # fmt: skip
    tile = load_rows(key, columns, keys, key_token, DIM, BLOCK_D, False)
    total = tl.zeros([BLOCK_N], tl.float32)
    if CAUSAL or WINDOWED or MASKED:
        total = _add_queries(
            total, tile, query, lse, real, query_token, real_row, columns, start, begins, queries, keys,
            mask, mask_row, mask_column, offset, window, scale, DIM, BLOCK_D,
            CAUSAL, WINDOWED, MASKED, PER_ROW, PADDED, False, BLOCK_M,
        )  # fmt: skip
    if not MASKED:
        total = _add_queries(
            total, tile, query, lse, real, query_token, real_row, columns, begins, ends, queries, keys,
            mask, mask_row, mask_column, offset, window, scale, DIM, BLOCK_D,
            CAUSAL, WINDOWED, MASKED, PER_ROW, PADDED, True, BLOCK_M,
        )  # fmt: skip
    total = _add_queries(
        total, tile, query, lse, real, query_token, real_row, columns, ends, end, queries, keys,
        mask, mask_row, mask_column, offset, window, scale, DIM, BLOCK_D,
        CAUSAL, WINDOWED, MASKED, PER_ROW, PADDED, False, BLOCK_M,
    )  # fmt: skip
    tl.store(mass + place * keys + columns, total, mask=columns < keys)


@triton.jit(do_not_specialize=VARYING)
def row_counts_kernel(
    counts,
    nearest,
    mask,
    first,
    last,
    mask_batch,
    mask_row,
    mask_column,
    bound_batch,
    bound_row,
    queries,
    keys,
    offset,
    window,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    MASKED: tl.constexpr,
    PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (batch, block of queries): how many keys each sees, and the first of them."""
    count = tl.cdiv(queries, BLOCK_M)
    batch = (tl.program_id(0) // count).to(tl.int64)
    rows = tl.program_id(0) % count * BLOCK_M + tl.arange(0, BLOCK_M)
    mask += batch * mask_batch
    first += batch * bound_batch
    last += batch * bound_batch
    start, end = key_range(
        rows, rows < queries, keys, first, last, bound_row, offset, window, CAUSAL, WINDOWED, MASKED
    )  # fmt: skip
    number = tl.zeros([BLOCK_M], tl.int32)
    lowest = tl.full([BLOCK_M], 2147483647, tl.int32)
    for begin in range(start, end, BLOCK_N):
        columns = begin + tl.arange(0, BLOCK_N)
        allowed = seen(
            rows[:, None], columns[None, :], queries, keys, mask, mask_row, mask_column, offset, window,
            CAUSAL, WINDOWED, MASKED, PER_ROW,
        )  # fmt: skip
        number += tl.sum(allowed.to(tl.int32), axis=1)
        lowest = tl.minimum(lowest, tl.min(tl.where(allowed, columns[None, :], 2147483647), axis=1))
    tl.store(counts + batch * queries + rows, number, mask=rows < queries)
    tl.store(nearest + batch * queries + rows, lowest, mask=rows < queries)


@triton.jit(do_not_specialize=VARYING)
def key_counts_kernel(
    seeing,
    longest,
    leading,
    counts,
    nearest,
    real,
    mask,
    first,
    last,
    real_batch,
    real_row,
    mask_batch,
    mask_row,
    mask_column,
    bound_batch,
    bound_row,
    queries,
    keys,
    offset,
    window,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    MASKED: tl.constexpr,
    PER_ROW: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (batch, block of keys): how many queries see each, and the most keys that any of those sees."""
    count = tl.cdiv(keys, BLOCK_N)
    batch = (tl.program_id(0) // count).to(tl.int64)
    low = tl.program_id(0) % count * BLOCK_N
    columns = low + tl.arange(0, BLOCK_N)
    mask += batch * mask_batch
    first += batch * bound_batch
    last += batch * bound_batch
    start, end = query_range(
        low, tl.minimum(low + BLOCK_N, keys) - 1, queries, first, last, bound_row, offset, window,
        CAUSAL, WINDOWED, MASKED,
    )  # fmt: skip
    number = tl.zeros([BLOCK_N], tl.int32)
    most = tl.zeros([BLOCK_N], tl.int32)
    earlier = tl.zeros([BLOCK_N], tl.int32)
    for begin in range(start, end, BLOCK_M):
        rows = begin + tl.arange(0, BLOCK_M)
        allowed = seen(
            rows[None, :], columns[:, None], queries, keys, mask, mask_row, mask_column, offset, window,
            CAUSAL, WINDOWED, MASKED, PER_ROW,
        )  # fmt: skip
        if PADDED:
            kept = tl.load(real + batch * real_batch + rows * real_row, mask=rows < queries, other=0) != 0
            allowed = allowed & kept[None, :]
        width = tl.load(counts + batch * queries + rows, mask=rows < queries, other=0)
        begins = tl.load(nearest + batch * queries + rows, mask=rows < queries, other=0)
        number += tl.sum(allowed.to(tl.int32), axis=1)
        most = tl.maximum(most, tl.max(tl.where(allowed, width[None, :], 0), axis=1))
        before = allowed & (begins[None, :] < columns[:, None])
        earlier = tl.maximum(earlier, tl.max(before.to(tl.int32), axis=1))
    tl.store(seeing + batch * keys + columns, number, mask=columns < keys)
    tl.store(longest + batch * keys + columns, most, mask=columns < keys)
    tl.store(leading + batch * keys + columns, (number > 0) & (earlier == 0), mask=columns < keys)


@functools.cache
def launches(dtype: torch.dtype, dim: int) -> tuple[Launch, ...]:
    """Tiles worth trying, the default first."""
    if dtype == torch.float32:
        sizes = [(32, 32, 4, 1), (32, 32, 8, 1)]
    elif dim > 128:
        sizes = [(32, 128, 8, 2), (64, 64, 4, 2)]
    else:
        sizes = [(64, 128, 8, 3), (64, 128, 8, 2), (64, 64, 8, 2), (64, 128, 4, 3), (128, 128, 8, 3)]
    return settings(sizes, dim, dtype, streamed=("BLOCK_M", 1), held=("BLOCK_N", 1))


def column_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    real: torch.Tensor | None,
    scaling: float,
    mask: KeyMask,
) -> torch.Tensor:
    """`(B, H, Tk)` float32: sum over queries of the weights that a key gets."""
    query, key = rowwise(query), rowwise(key)
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    mass = query.new_empty(batch, heads, keys, dtype=torch.float32)
    sizes = sizes_of(query, key, key, scaling)
    arguments = {
        "query": query,
        "key": key,
        "lse": lse.float().contiguous(),
        "mass": mass,
        **_real_arguments(real, batch, queries, mass),
        **mask_arguments(mask, mass),
        **strides_of(query=query, key=key),
        **{name: size for name, size in sizes.items() if name not in ("DIM_V", "BLOCK_V")},
    }
    if are_few(query, key):
        column_mass_few(arguments, batch)
        return mass
    launch(
        column_mass_kernel,
        "column_mass",
        lambda settings: triton.cdiv(keys, settings.blocks["BLOCK_N"]) * batch * heads,
        arguments,
        launches(query.dtype, query.shape[-1]),
        query.device,
    )
    return mass


def key_counts(
    queries: int, keys: int, batch: int, real: torch.Tensor | None, mask: KeyMask, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(B, Tk)` each, int32, int32 and bool: see `KeyCounts`."""
    counts, nearest = (torch.empty(batch, queries, dtype=torch.int32, device=device) for _ in range(2))
    seeing, longest = (torch.empty(batch, keys, dtype=torch.int32, device=device) for _ in range(2))
    leading = torch.empty(batch, keys, dtype=torch.bool, device=device)
    settings = COUNTS.arguments()
    sizes = {"queries": queries, "keys": keys, **mask_arguments(mask, counts)}
    with on_device(counts):
        row_blocks = triton.cdiv(queries, settings["BLOCK_M"]) * batch
        row_counts_kernel[(row_blocks,)](counts=counts, nearest=nearest, **sizes, **settings)
        key_blocks = triton.cdiv(keys, settings["BLOCK_N"]) * batch
        key_counts_kernel[(key_blocks,)](
            seeing=seeing,
            longest=longest,
            leading=leading.view(torch.uint8),
            counts=counts,
            nearest=nearest,
            **_real_arguments(real, batch, queries, counts),
            **sizes,
            **settings,
        )
    return seeing, longest, leading


COUNTS = Launch({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=1)


def _real_arguments(real: torch.Tensor | None, batch: int, queries: int, other: torch.Tensor) -> dict[str, Any]:
    if real is None:
        return {"real": other, "real_batch": 0, "real_row": 0, "PADDED": False}
    bits = real.view(torch.uint8).expand(batch, queries)
    return {"real": bits, "real_batch": bits.stride(0), "real_row": bits.stride(1), "PADDED": True}
