"""Triton's kernel of `column_mass` of few queries: while generating, or of a prompt's last rows. Imports triton."""

# mypy: disable-error-code="no-untyped-def"
from typing import Any

import torch
import triton
import triton.language as tl

from .split_attention_launch import launch
from .split_attention_tiles_triton import LOG2_E, load_rows, seen
from .tiles import VARYING
from .tuning import SMALLEST, Launch, bucket, settings

QUERIES = 64  # at most


@triton.jit(do_not_specialize=VARYING)
def column_mass_few_kernel(
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
    HEADS: tl.constexpr,
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
    """One program per (batch, kv head, block of keys), which are read once for all its query heads.

    HEADS is the power of two at or above their number; a tile's rows are BLOCK_M / HEADS queries of each.
    """
    ROWS: tl.constexpr = BLOCK_M // HEADS
    count = tl.cdiv(keys, BLOCK_N)
    columns = tl.program_id(0) % count * BLOCK_N + tl.arange(0, BLOCK_N)
    place = (tl.program_id(0) // count).to(tl.int64)
    batch = place // (heads // group)
    kv_head = place % (heads // group)
    real += batch * real_batch
    mask += batch * mask_batch
    index = tl.arange(0, BLOCK_M)
    head = kv_head * group + index // ROWS
    own = index // ROWS < group
    dims = tl.arange(0, BLOCK_D)[None, :]
    tile = load_rows(key + batch * key_batch + kv_head * key_head, columns, keys, key_token, DIM, BLOCK_D, False)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for begin in range(0, queries, ROWS):
        rows = begin + index % ROWS
        live = own & (rows < queries)
        start = batch * query_batch + head * query_head + rows.to(tl.int64) * query_token
        some = tl.load(query + start[:, None] + dims, mask=live[:, None] & (dims < DIM), other=0.0)
        base = tl.load(lse + (batch * heads + head) * queries + rows, mask=live, other=float("inf"))
        base = tl.where(base == float("-inf"), float("inf"), base * LOG2_E)
        if PADDED:
            counts = tl.load(real + rows * real_row, mask=live, other=0) != 0
            base = tl.where(counts, base, float("inf"))
        logits = tl.dot(tile, tl.trans(some), input_precision="ieee")
        allowed = seen(
            rows[None, :], columns[:, None], queries, keys, mask, mask_row, mask_column, offset, window,
            CAUSAL, WINDOWED, MASKED, PER_ROW,
        )  # fmt: skip
        total += tl.where(allowed, tl.exp2(logits * scale - base[None, :]), 0.0)
    sums = tl.sum(tl.reshape(total, (BLOCK_N, HEADS, ROWS)), axis=2)
    number = tl.arange(0, HEADS)
    line = batch * heads + kv_head * group + number
    inside = (columns < keys)[:, None] & (number < group)[None, :]
    tl.store(mass + line[None, :] * keys + columns[:, None], sums, mask=inside)


def are_few(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether this kernel is meant for so many queries and query heads of a kv head."""
    return query.shape[2] <= QUERIES and query.shape[1] // key.shape[1] <= SMALLEST


def launches(dtype: torch.dtype, dim: int) -> tuple[Launch, ...]:
    """Launch settings."""
    sizes = [(32, 32, 4, 1), (32, 32, 8, 1)] if dtype == torch.float32 else [(32, 64 if dim > 128 else 128, 4, 2)]
    return settings(sizes, dim, dtype, streamed=("BLOCK_M", 1), held=("BLOCK_N", 1))


def column_mass_few(arguments: dict[str, Any], batch: int) -> None:
    """Run the kernel with the arguments of `column_mass_triton`'s."""
    query, key = arguments["query"], arguments["key"]
    launch(
        column_mass_few_kernel,
        "column_mass_few",
        lambda chosen: triton.cdiv(key.shape[2], chosen.blocks["BLOCK_N"]) * batch * key.shape[1],
        {**arguments, "HEADS": bucket(arguments["group"])},
        launches(query.dtype, query.shape[-1]),
        query.device,
    )
