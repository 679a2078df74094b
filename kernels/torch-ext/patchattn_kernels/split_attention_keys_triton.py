"""Triton's kernel of `split_attention`'s backward that goes through the keys; the formula: see the other one's file."""

# mypy: disable-error-code="no-untyped-def"
import functools

import torch
import triton
import triton.language as tl

from .split_attention_tiles_triton import full_queries, load_lse, load_rows, query_range, seen, store_rows
from .tiles import VARYING
from .tuning import Launch, settings


@triton.jit
def _key_gradient_of_queries(
    key_total,
    value_total,
    keys_tile,
    values,
    members,
    query,
    given,
    lse,
    extra,
    query_token,
    given_token,
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
    DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    MASKED: tl.constexpr,
    PER_ROW: tl.constexpr,
    OUTPUT: tl.constexpr,
    LISTED: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    for begin in range(start, end, BLOCK_M):
        rows = begin + tl.arange(0, BLOCK_M)
        tile = load_rows(query, rows, queries, query_token, DIM, BLOCK_D, FULL)
        base = load_lse(lse, rows, queries)
        change = tl.load(extra + rows, mask=rows < queries, other=0.0)[None, :]
        logits = tl.dot(keys_tile, tl.trans(tile), input_precision="ieee")
        powers = tl.exp2(logits * scale - base[None, :])
        if not FULL:
            allowed = seen(
                rows[None, :], columns[:, None], queries, keys, mask, mask_row, mask_column, offset, window,
                CAUSAL, WINDOWED, MASKED, PER_ROW,
            )  # fmt: skip
            powers = tl.where(allowed, powers, 0.0)
        if LISTED:
            powers = tl.where(members[:, None], powers, 0.0)
        if OUTPUT:
            upper = load_rows(given, rows, queries, given_token, DIM_V, BLOCK_V, FULL)
            value_total = tl.dot(powers.to(upper.dtype), upper, value_total, input_precision="ieee")
            change = tl.dot(values, tl.trans(upper), input_precision="ieee") + change
        key_total = tl.dot((powers * change).to(tile.dtype), tile, key_total, input_precision="ieee")
    return key_total, value_total


@triton.jit(do_not_specialize=VARYING)
def key_gradient_kernel(
    query,
    key,
    value,
    given,
    lse,
    extra,
    key_gradient,
    value_gradient,
    chosen,
    mask,
    first,
    last,
    query_batch,
    query_head,
    query_token,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    given_batch,
    given_head,
    given_token,
    key_gradient_batch,
    key_gradient_head,
    key_gradient_token,
    value_gradient_batch,
    value_gradient_head,
    value_gradient_token,
    chosen_batch,
    chosen_head,
    chosen_token,
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
    scaling,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    MASKED: tl.constexpr,
    PER_ROW: tl.constexpr,
    OUTPUT: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (batch, kv head, block of keys): the keys' and values' gradients, over all heads of the group."""
    count = tl.cdiv(keys, BLOCK_N)
    block = tl.program_id(0) % count  # causal: the first ones are seen by most
    place = (tl.program_id(0) // count).to(tl.int64)
    groups = heads // group
    batch = place // groups
    kv_head = place % groups
    key += batch * key_batch + kv_head * key_head
    value += batch * value_batch + kv_head * value_head
    key_gradient += batch * key_gradient_batch + kv_head * key_gradient_head
    value_gradient += batch * value_gradient_batch + kv_head * value_gradient_head
    mask += batch * mask_batch
    first += batch * bound_batch
    last += batch * bound_batch

    low = block * BLOCK_N
    columns = low + tl.arange(0, BLOCK_N)
    high = low + BLOCK_N - 1
    start, end = query_range(
        low, tl.minimum(high, keys - 1), queries, first, last, bound_row, offset, window, CAUSAL, WINDOWED, MASKED
    )  # fmt: skip
    begins, ends = full_queries(
        low, high, start, end, keys, queries, offset, window, CAUSAL, WINDOWED, MASKED, BLOCK_M
    )  # fmt: skip
    tile = load_rows(key, columns, keys, key_token, DIM, BLOCK_D, False)
    values = tile
    if OUTPUT:
        values = load_rows(value, columns, keys, value_token, DIM_V, BLOCK_V, False)
    key_total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    value_total = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for number in range(group):
        head = kv_head * group + number
        query_part = query + batch * query_batch + head * query_head
        given_part = given + batch * given_batch + head * given_head
        lse_part = lse + (batch * heads + head) * queries
        extra_part = extra + (batch * heads + head) * queries
        members = columns < keys
        stop = end
        if LISTED:  # a block without a key of the set has nothing to go through
            place_of = chosen + batch * chosen_batch + head * chosen_head + columns.to(tl.int64) * chosen_token
            members = tl.load(place_of, mask=members, other=0) != 0
            stop = tl.where(tl.max(members.to(tl.int32), axis=0) > 0, end, start)
        if CAUSAL or WINDOWED or MASKED:
            key_total, value_total = _key_gradient_of_queries(
                key_total, value_total, tile, values, members, query_part, given_part, lse_part, extra_part,
                query_token, given_token, columns, start, tl.minimum(begins, stop), queries, keys,
                mask, mask_row, mask_column, offset, window, scale, DIM, DIM_V, BLOCK_D, BLOCK_V,
                CAUSAL, WINDOWED, MASKED, PER_ROW, OUTPUT, LISTED, False, BLOCK_M,
            )  # fmt: skip
        if not MASKED:
            key_total, value_total = _key_gradient_of_queries(
                key_total, value_total, tile, values, members, query_part, given_part, lse_part, extra_part,
                query_token, given_token, columns, begins, tl.minimum(ends, stop), queries, keys,
                mask, mask_row, mask_column, offset, window, scale, DIM, DIM_V, BLOCK_D, BLOCK_V,
                CAUSAL, WINDOWED, MASKED, PER_ROW, OUTPUT, LISTED, True, BLOCK_M,
            )  # fmt: skip
        key_total, value_total = _key_gradient_of_queries(
            key_total, value_total, tile, values, members, query_part, given_part, lse_part, extra_part,
            query_token, given_token, columns, ends, stop, queries, keys,
            mask, mask_row, mask_column, offset, window, scale, DIM, DIM_V, BLOCK_D, BLOCK_V,
            CAUSAL, WINDOWED, MASKED, PER_ROW, OUTPUT, LISTED, False, BLOCK_M,
        )  # fmt: skip
    store_rows(key_gradient, columns, keys, key_gradient_token, key_total * scaling, DIM, BLOCK_D)
    if OUTPUT:
        store_rows(value_gradient, columns, keys, value_gradient_token, value_total, DIM_V, BLOCK_V)


@functools.cache
def launches(dtype: torch.dtype, dim: int) -> tuple[Launch, ...]:
    """Tiles worth trying, the default first."""
    if dtype == torch.float32:
        sizes = [(32, 32, 4, 1), (32, 32, 8, 1)]
    elif dim > 128:
        sizes = [(32, 32, 8, 1)]
    elif dim > 64:  # larger tiles spill registers
        sizes = [(32, 128, 8, 2), (64, 32, 8, 2)]
    else:
        sizes = [(64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 4, 2)]
    return settings(sizes, dim, dtype, streamed=("BLOCK_M", 2), held=("BLOCK_N", 2))
