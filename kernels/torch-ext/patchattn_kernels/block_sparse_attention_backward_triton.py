"""Triton's kernels of block-sparse attention's gradients, and their launches. Imports triton: imported when they run.

Queries' gradients go through the key tiles that the forward pass reads; keys' and values' through the query tiles that
read them. All queries read the sinks: their share is summed apart, by several programs, and added by the last kernel.
"""

# mypy: disable-error-code="no-untyped-def"
import functools
from typing import Any

import torch
import triton
import triton.language as tl

from .backend import on_device, rowwise
from .block_lists import BlockLists, SinkAndRecent, transposed
from .block_sparse_attention_triton import (
    LOG2E,
    MOST,
    after,
    counted,
    fitted,
    is_whole,
    key_tiles,
    list_numbers,
    list_row,
    place_of,
    rows_of,
    seen_pairs,
    shape_of,
    shares,
    store_rows,
    visibility,
)
from .rows import AttentionRule
from .tiles import VARYING, visible
from .tuning import Launch, run_chosen, settings, tile_width


@triton.jit(do_not_specialize=VARYING)
def deltas(
    gradient, output, lse, lse_gradient, delta, power, heads, queries, g_batch, g_head, g_row, o_batch, o_head, o_row,
    VDIM: tl.constexpr, VPAD: tl.constexpr, BLOCK_M: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """What a softmax takes off its weights' gradients, and the log-sum-exp in base 2; inf of rows that see nothing."""
    tile, line, _ = place_of(tl.cdiv(queries, BLOCK_M))
    batch, head = (line // heads).to(tl.int64), (line % heads).to(tl.int64)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    given = rows_of(gradient + batch * g_batch + head * g_head, rows, g_row, queries, VDIM, VPAD)
    result = rows_of(output + batch * o_batch + head * o_head, rows, o_row, queries, VDIM, VPAD)
    sums = tl.sum(given.to(tl.float32) * result.to(tl.float32), axis=1)
    place = line.to(tl.int64) * queries + rows
    if SUMMED:
        sums -= tl.load(lse_gradient + place, mask=rows < queries, other=0.0)
    tl.store(delta + place, sums, mask=rows < queries)
    known = tl.load(lse + place, mask=rows < queries, other=0.0)
    tl.store(power + place, tl.where(known == float("-inf"), float("inf"), known * LOG2E), mask=rows < queries)


@triton.jit(do_not_specialize=VARYING)
def query_gradients(
    query, key, value, gradient, power, delta, result, first, second, order, places, mask, scale, scaling, heads,
    group, queries, keys, offset, window, width, list_batch, list_head, q_batch, q_head, q_row, k_batch, k_head, k_row,
    v_batch, v_head, v_row, g_batch, g_head, g_row, r_batch, r_head, r_row, order_batch, mask_batch, mask_row,
    mask_column, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr,
    VDIM: tl.constexpr, VPAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LISTED: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr, PER_ROW: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Of a tile of queries of one head; the same sequence of key tiles as in the forward kernel."""
    ROWS: tl.constexpr = BLOCK_M if BLOCK_Q == 0 or BLOCK_Q > BLOCK_M else BLOCK_Q
    tile, line, _ = place_of(tl.cdiv(queries, ROWS))
    tile = tl.cdiv(queries, ROWS) - 1 - tile
    batch, head = line // heads, line % heads
    inner = tl.arange(0, BLOCK_M)
    rows = tl.where(inner < ROWS, tile * ROWS + inner, queries)
    low = tile * ROWS + offset
    high = tl.minimum(tile * ROWS + ROWS, queries) - 1 + offset
    order += batch.to(tl.int64) * order_batch
    places += batch.to(tl.int64) * (order_batch + (order_batch > 0))
    mask += batch.to(tl.int64) * mask_batch
    query += batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
    gradient += batch.to(tl.int64) * g_batch + head.to(tl.int64) * g_head
    key += batch.to(tl.int64) * k_batch + (head // group).to(tl.int64) * k_head
    value += batch.to(tl.int64) * v_batch + (head // group).to(tl.int64) * v_head
    sinks, recent, sink_first, sink_tiles, recent_first = 0, 0, 0, 0, 0
    if LISTED:
        listed = list_row(batch, head, tile, list_batch, list_head, BLOCK_Q // ROWS)
        tiles = tl.load(second + listed) * (BLOCK_K // BLOCK_N)
        first += listed * width
    else:
        sinks = tl.minimum(tl.load(first + head), MOST)
        recent = tl.minimum(tl.load(second + head), MOST)
        sink_first, sink_tiles, recent_first, tiles = key_tiles(
            low, high, order, places, sinks, recent, keys, BLOCK_N, CAUSAL, PADDED
        )
        tiles += sink_tiles
    result += batch.to(tl.int64) * r_batch + head.to(tl.int64) * r_head
    if tiles <= 0:
        store_rows(result, tl.zeros([BLOCK_M, PAD], tl.float32), rows, r_row, queries, DIM, PAD)
        return
    tl.assume(tiles > 0)  # a loop that may be skipped makes the products wait for each other

    some = rows_of(query, rows, q_row, queries, DIM, PAD)
    outer = rows_of(gradient, rows, g_row, queries, VDIM, VPAD)
    place = line.to(tl.int64) * queries + rows
    sums = tl.load(power + place, mask=rows < queries, other=float("inf"))
    taken = tl.load(delta + place, mask=rows < queries, other=0.0)
    acc = tl.zeros([BLOCK_M, PAD], tl.float32)
    for step in range(tiles):
        if LISTED:
            begin = tl.load(first + step // (BLOCK_K // BLOCK_N)) * BLOCK_K + step % (BLOCK_K // BLOCK_N) * BLOCK_N
        else:
            begin = tl.where(step < sink_tiles, sink_first + step, recent_first + step - sink_tiles) * BLOCK_N
        columns = begin + tl.arange(0, BLOCK_N)
        keys_of = rows_of(key, columns, k_row, keys, DIM, PAD)
        values_of = rows_of(value, columns, v_row, keys, VDIM, VPAD)
        logits = tl.dot(some, tl.trans(keys_of), input_precision="ieee") * scale
        partly = True
        if not MASKED and not WINDOWED:
            partly = not is_whole(begin, low, high, sinks, recent, keys, BLOCK_N, LISTED, CAUSAL)
        if partly:
            seen = seen_pairs(
                rows, columns, order, mask, sinks, recent, queries, keys, offset, window, mask_row, mask_column,
                LISTED, CAUSAL, WINDOWED, MASKED, PER_ROW, PADDED,
            )  # fmt: skip
            logits = tl.where(seen, logits, float("-inf"))
        weights = tl.exp2(logits - sums[:, None])
        product = tl.dot(outer, tl.trans(values_of), input_precision="ieee")
        change = (weights * (product - taken[:, None])).to(keys_of.dtype)
        acc = tl.dot(change, keys_of, acc, input_precision="ieee")
    store_rows(result, acc * scaling, rows, r_row, queries, DIM, PAD)


@triton.jit
def query_tiles(
    begin, stop, number, order, places, sinks, recent, queries, keys, offset, BLOCK_M: tl.constexpr,
    SINKS: tl.constexpr, CAUSAL: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """The first query tile and how many, of the queries that see the keys `begin` to `stop` as recent ones; or, with
    SINKS, those that may see real keys from the one after `number` others on as sinks and not as recent ones."""
    if SINKS:
        low = 0
        if CAUSAL:
            low = after(places, number + recent, keys, PADDED)
        high = tl.where(number < sinks, keys, 0)
    else:
        behind = counted(order, begin, keys, PADDED) - recent
        low = tl.where(behind < 0, 0, after(places, behind, keys, PADDED))
        if CAUSAL:
            low = tl.maximum(low, begin)
        high = after(places, counted(order, stop - 1, keys, PADDED) + recent - 1, keys, PADDED)
    low = tl.maximum(low - offset, 0) // BLOCK_M
    high = tl.cdiv(tl.minimum(tl.maximum(high - offset, 0), queries), BLOCK_M)
    return low, tl.maximum(high - low, 0)


@triton.jit(do_not_specialize=VARYING)
def key_gradients(
    query, key, value, gradient, power, delta, key_result, value_result, key_part, value_part, first, second, order,
    places, mask, scale, scaling, heads, group, queries, keys, offset, window, width, list_batch, list_head, most,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch, g_head, g_row, order_batch,
    mask_batch, mask_row, mask_column, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DIM: tl.constexpr,
    PAD: tl.constexpr, VDIM: tl.constexpr, VPAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LISTED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr, PER_ROW: tl.constexpr,
    PADDED: tl.constexpr, SINKS: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Of a tile of keys and values of one kv head.

    With SINKS of the first `most` real keys only, for queries of which they are no recent keys, as one of several
    parts; else, with ADDED, the sum of those parts is added. `first` and `second` are lists of query blocks, or sizes.
    """
    STEP: tl.constexpr = BLOCK_M if BLOCK_Q == 0 or BLOCK_Q > BLOCK_M else BLOCK_Q
    PER: tl.constexpr = 1 if BLOCK_Q == 0 else BLOCK_Q // STEP
    tile, line, lines = place_of(tl.cdiv(most if SINKS else keys, BLOCK_N))
    groups = heads // group
    batch, kv_head = line // groups, line % groups
    order += batch.to(tl.int64) * order_batch
    places += batch.to(tl.int64) * (order_batch + (order_batch > 0))
    mask += batch.to(tl.int64) * mask_batch
    key += batch.to(tl.int64) * k_batch + kv_head.to(tl.int64) * k_head
    value += batch.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head
    begin = tile * BLOCK_N
    stop = tl.minimum(begin + BLOCK_N, keys)
    columns = begin + tl.arange(0, BLOCK_N)
    numbers = columns
    if SINKS:
        columns = tl.where(numbers < most, after(places, numbers, keys, PADDED), keys)
    keys_of = rows_of(key, columns, k_row, keys, DIM, PAD)
    values_of = rows_of(value, columns, v_row, keys, VDIM, VPAD)
    key_sum = tl.zeros([BLOCK_N, PAD], tl.float32)
    value_sum = tl.zeros([BLOCK_N, VPAD], tl.float32)
    split, splits = tl.program_id(1), tl.num_programs(1)
    inner = tl.arange(0, BLOCK_M)
    for member in range(group):
        head = kv_head * group + member
        sinks, recent, lowest = 0, 0, 0
        listed = first
        if LISTED:
            row = list_row(batch, head, tile, list_batch, list_head, BLOCK_K // BLOCK_N)
            tiles = tl.load(second + row) * PER
            listed = first + row * width
        else:
            sinks = tl.minimum(tl.load(first + head), MOST)
            recent = tl.minimum(tl.load(second + head), MOST)
            lowest, tiles = query_tiles(
                begin, stop, begin, order, places, sinks, recent, queries, keys, offset, BLOCK_M, SINKS, CAUSAL, PADDED
            )
        query_of = query + batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
        gradient_of = gradient + batch.to(tl.int64) * g_batch + head.to(tl.int64) * g_head
        of_head = (batch.to(tl.int64) * heads + head) * queries
        for step in range(tiles * split // splits, tiles * (split + 1) // splits):
            if LISTED:
                row_begin = tl.load(listed + step // PER) * BLOCK_Q + step % PER * STEP
            else:
                row_begin = (lowest + step) * BLOCK_M
            rows = tl.where(inner < STEP, row_begin + inner, queries)
            some = rows_of(query_of, rows, q_row, queries, DIM, PAD)
            outer = rows_of(gradient_of, rows, g_row, queries, VDIM, VPAD)
            sums = tl.load(power + of_head + rows, mask=rows < queries, other=float("inf"))
            taken = tl.load(delta + of_head + rows, mask=rows < queries, other=0.0)
            logits = tl.dot(keys_of, tl.trans(some), input_precision="ieee") * scale  # (N, M)
            partly = True
            if not MASKED and not WINDOWED and not SINKS:
                low = row_begin + offset
                high = tl.minimum(row_begin + STEP, queries) - 1 + offset
                partly = not is_whole(begin, low, high, 0, recent, keys, BLOCK_N, LISTED, CAUSAL)
            if partly:
                own = tl.minimum(rows, queries - 1)
                seen = visible(
                    own, columns, keys, mask, mask_row, mask_column, offset, window, CAUSAL, WINDOWED, MASKED, PER_ROW
                )
                if not LISTED:
                    number = numbers + 1
                    if not SINKS:
                        number = counted(order, columns, keys, PADDED)
                    behind = counted(order, own + offset, keys, PADDED)[:, None] - number[None, :]
                    near = (behind < recent) & (behind > -recent)
                    if SINKS:
                        near = (number <= sinks)[None, :] & ((behind >= recent) | (behind <= -recent))
                    seen = seen & near
                logits = tl.where(tl.trans(seen), logits, float("-inf"))
            weights = tl.exp2(logits - sums[None, :])
            value_sum = tl.dot(weights.to(outer.dtype), outer, value_sum, input_precision="ieee")
            product = tl.dot(values_of, tl.trans(outer), input_precision="ieee")
            change = (weights * (product - taken[None, :])).to(some.dtype)
            key_sum = tl.dot(change, some, key_sum, input_precision="ieee")
    if SINKS:
        part = (split.to(tl.int64) * lines + line) * most
        store_rows(key_part + part * DIM, key_sum, numbers, DIM, most, DIM, PAD)
        store_rows(value_part + part * VDIM, value_sum, numbers, VDIM, most, VDIM, VPAD)
    else:
        if ADDED:
            number = counted(order, columns, keys, PADDED) - 1
            real = columns < keys
            if PADDED:  # a key that is not real counts as many as the real one before it
                real = real & (tl.load(order + columns - 1, mask=real & (columns > 0), other=0) <= number)
            number = tl.where(real, number, most)
            key_sum += rows_of(key_part + line.to(tl.int64) * most * DIM, number, DIM, most, DIM, PAD)
            value_sum += rows_of(value_part + line.to(tl.int64) * most * VDIM, number, VDIM, most, VDIM, VPAD)
        key_result += line.to(tl.int64) * keys * DIM
        value_result += line.to(tl.int64) * keys * VDIM
        store_rows(key_result, key_sum * scaling, columns, DIM, keys, DIM, PAD)
        store_rows(value_result, value_sum, columns, VDIM, keys, VDIM, VPAD)


@functools.cache
def launches(dim: int, dtype: torch.dtype) -> tuple[Launch, ...]:
    """Candidates for both kernels, the default first."""
    if dtype == torch.float32:
        sizes = [(32, 32, 4, 1), (32, 32, 8, 1)]
    elif dim <= 64:
        sizes = [(64, 64, 4, 3), (64, 64, 8, 2), (128, 64, 8, 2), (64, 128, 8, 2)]
    elif dim <= 128:
        sizes = [(64, 64, 8, 2), (32, 64, 8, 2), (64, 128, 8, 2), (64, 64, 4, 2)]
    else:
        sizes = [(32, 32, 8, 2), (32, 64, 8, 2), (64, 64, 8, 1)]
    # one kernel holds queries and loads keys, the other the reverse: the larger of both blocks counts
    return tuple(
        max(pair, key=lambda launch: launch.shared_memory(9))
        for pair in zip(
            settings(sizes, dim, dtype, streamed=("BLOCK_N", 2), held=("BLOCK_M", 2)),
            settings(sizes, dim, dtype, streamed=("BLOCK_M", 2), held=("BLOCK_N", 2)),
            strict=True,
        )
    )


def backward(
    gradient: torch.Tensor,
    lse_gradient: torch.Tensor | None,
    output: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keep: SinkAndRecent | BlockLists,
    rule: AttentionRule,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, contiguous."""
    query, key, value, gradient = (rowwise(tensor) for tensor in (query, key, value, gradient))
    batch, heads, rows, dim = query.shape
    groups, keys, width = key.shape[1], key.shape[2], value.shape[-1]
    numbers, constants = visibility(keep, rule, rows, keys, query.device)
    numbers |= {"scale": rule.scaling * LOG2E.value, "scaling": rule.scaling, "heads": heads, "group": heads // groups}
    numbers |= {"queries": rows, "keys": keys}
    constants |= {"DIM": dim, "PAD": tile_width(dim), "VDIM": width, "VPAD": tile_width(width)}
    for name, tensor in (("q", query), ("k", key), ("v", value), ("g", gradient)):
        numbers |= dict(zip((f"{name}_batch", f"{name}_head", f"{name}_row"), tensor.stride(), strict=False))
    delta, power = torch.empty_like(lse), torch.empty_like(lse)
    results = [tensor.new_empty(tensor.shape) for tensor in (query, key, value)]
    operands = (query, key, value, gradient, power, delta)
    candidates, shape = launches(max(dim, width), query.dtype), shape_of(query, value, constants)

    def run_queries(launch: Launch) -> Any:
        arguments = fitted(launch, constants)
        step = min(arguments["BLOCK_M"], constants["BLOCK_Q"] or arguments["BLOCK_M"])
        strides = dict(zip(("r_batch", "r_head", "r_row"), results[0].stride(), strict=False))
        return query_gradients[(triton.cdiv(rows, step) * batch * heads,)](
            *operands, results[0], **numbers, **strides, **constants, **arguments
        )

    others: dict[str, Any] = dict(numbers)
    if isinstance(keep, BlockLists):
        others |= list_numbers(transposed(keep, triton.cdiv(keys, keep.block_k)))

    def run_keys(launch: Launch) -> Any:
        arguments = fitted(launch, constants)
        most = 0 if isinstance(keep, BlockLists) else min(keep.most_sinks, keys)
        parts = [query.new_empty(0), query.new_empty(0)]
        lines = batch * groups
        if most > 0:
            tiles = triton.cdiv(most, arguments["BLOCK_N"])
            splits = shares(query.device, tiles * lines, triton.cdiv(rows, arguments["BLOCK_M"]))
            sizes = (splits, batch, groups, most)
            parts = [query.new_empty(*sizes, size, dtype=torch.float32) for size in (dim, width)]
            key_gradients[(tiles * lines, splits)](
                *operands, results[1], results[2], *parts, most=most, SINKS=True, ADDED=False,
                **others, **constants, **arguments,
            )  # fmt: skip
            parts = [part.sum(dim=0) for part in parts]
        return key_gradients[(triton.cdiv(keys, arguments["BLOCK_N"]) * lines, 1)](
            *operands, results[1], results[2], *parts, most=most, SINKS=False, ADDED=most > 0,
            **others, **constants, **arguments,
        )  # fmt: skip

    with on_device(query):
        deltas[(triton.cdiv(rows, 32) * batch * heads,)](
            gradient, output, lse, lse if lse_gradient is None else lse_gradient.contiguous(), delta, power, heads,
            rows, *gradient.stride()[:3], *output.stride()[:3], VDIM=width, VPAD=tile_width(width), BLOCK_M=32,
            SUMMED=lse_gradient is not None,
        )  # fmt: skip
        run_chosen("block_sparse_attention_queries", shape, candidates, query.device, run_queries)
        run_chosen("block_sparse_attention_keys", shape, candidates, query.device, run_keys)
    return results[0], results[1], results[2]
