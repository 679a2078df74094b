"""Triton's kernels of the backward of `routed_attention`. Imports triton.

Gradients of queries and gates by the same blocks of selected pairs as the forward; those of keys and values by one
program per block of keys, over the pairs that see it. Every number is written by one program: no atomics.
"""

# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl

from .backend import on_device
from .key_mask import KeyMask
from .routed_pairs_triton import (
    arguments,
    block_of_pairs,
    gather_rows,
    interior,
    launch,
    load_rows,
    pairs_of,
    selected_pairs,
)
from .tiles import VARYING, key_range, visible


@triton.jit
def _query_tiles(
    acc, gate_acc, query, upstream, factor, delta, sums, key, value, low, high, rows, scale, keys, key_row, value_row,
    mask, mask_row, mask_column, offset, window,
    DIM: tl.constexpr, PAD: tl.constexpr, VDIM: tl.constexpr, VPAD: tl.constexpr, BLOCK_N: tl.constexpr,
    CHECKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """What the keys from `low` to `high` add to the gradients of a tile of queries and of their gates."""
    for begin in range(low, high, BLOCK_N):
        columns = begin + tl.arange(0, BLOCK_N)
        tile = load_rows(key, begin, key_row, keys, BLOCK_N, DIM, PAD, CHECKED)
        logits = tl.dot(query, tl.trans(tile), input_precision="ieee")
        if CHECKED:
            seen = visible(
                rows, columns, keys, mask, mask_row, mask_column, offset, window, CAUSAL, WINDOWED, MASKED, PER_ROW
            )
            logits = tl.where(seen, logits, float("-inf"))
        elif MASKED:
            real = tl.load(mask + columns.to(tl.int64) * mask_column) != 0
            logits = tl.where(real[None, :], logits, float("-inf"))
        weights = tl.exp2(logits * scale - sums[:, None])
        values = load_rows(value, begin, value_row, keys, BLOCK_N, VDIM, VPAD, CHECKED)
        towards = tl.dot(upstream, tl.trans(values), input_precision="ieee")
        gate_acc += tl.sum(weights * towards, axis=1)
        slope = weights * (towards * factor[:, None] - delta[:, None])
        acc = tl.dot(slope.to(tile.dtype), tile, acc, input_precision="ieee")
    return acc, gate_acc


@triton.jit(do_not_specialize=VARYING)
def _queries(
    query, key, value, gate, output, upstream, lse, delta, query_gradient, gate_gradient, pairs, starts,
    scale, queries, keys, groups,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    mask, mask_batch, mask_row, mask_column, first, last, bound_batch, bound_row, offset, window,
    REPEATS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, VDIM: tl.constexpr, VPAD: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr, PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of a list's pairs; `delta`, the sum of upstream times output, is kept for the keys."""
    program, block, count = block_of_pairs(starts, queries, REPEATS, BLOCK_M)
    if block < 0:
        return
    batch, group, rows, heads, live = pairs_of(pairs, program, block, count, queries, groups, REPEATS, BLOCK_M)
    if MASKED:
        mask += batch * mask_batch
        first += batch * bound_batch
        last += batch * bound_batch
    query = gather_rows(query + batch * query_batch, rows, heads, live, query_row, query_head, DIM, PAD)
    place = (batch * queries + rows) * groups * REPEATS + heads
    vdims = tl.arange(0, VPAD)
    inside = live[:, None] & (vdims < VDIM)[None, :]
    towards = tl.load(upstream + place[:, None] * VDIM + vdims[None, :], mask=inside, other=0.0)
    result = tl.load(output + place[:, None] * VDIM + vdims[None, :], mask=inside, other=0.0)
    sum_of = tl.sum(towards.to(tl.float32) * result.to(tl.float32), axis=1)
    tl.store(delta + place, sum_of, mask=live)
    factor = tl.load(gate + place, mask=live, other=0.0)
    sums = tl.load(lse + place, mask=live, other=float("inf"))
    key += batch * key_batch + group.to(tl.int64) * key_head
    value += batch * value_batch + group.to(tl.int64) * value_head

    acc = tl.zeros([BLOCK_M, PAD], tl.float32)
    gate_acc = tl.zeros([BLOCK_M], tl.float32)
    low, high = key_range(rows, live, keys, first, last, bound_row, offset, window, CAUSAL, WINDOWED, MASKED)
    low = tl.minimum(low, keys - 1) // BLOCK_N * BLOCK_N
    if MASKED and PER_ROW:
        high = tl.maximum(high, low + 1)  # as in the forward
        tl.assume(high > low)
        end = low
    else:
        begin, end = interior(rows, live, keys, low, high, offset, window, CAUSAL, WINDOWED, BLOCK_N)
        if WINDOWED:
            acc, gate_acc = _query_tiles(
                acc, gate_acc, query, towards, factor, sum_of, sums, key, value, low, tl.minimum(begin, high), rows,
                scale, keys, key_row, value_row, mask, mask_row, mask_column, offset, window,
                DIM, PAD, VDIM, VPAD, BLOCK_N, True, CAUSAL, WINDOWED, MASKED, PER_ROW,
            )  # fmt: skip
        acc, gate_acc = _query_tiles(
            acc, gate_acc, query, towards, factor, sum_of, sums, key, value, begin, end, rows,
            scale, keys, key_row, value_row, mask, mask_row, mask_column, offset, window,
            DIM, PAD, VDIM, VPAD, BLOCK_N, False, CAUSAL, WINDOWED, MASKED, PER_ROW,
        )  # fmt: skip
    acc, gate_acc = _query_tiles(
        acc, gate_acc, query, towards, factor, sum_of, sums, key, value, end, high, rows,
        scale, keys, key_row, value_row, mask, mask_row, mask_column, offset, window,
        DIM, PAD, VDIM, VPAD, BLOCK_N, True, CAUSAL, WINDOWED, MASKED, PER_ROW,
    )  # fmt: skip
    dims = tl.arange(0, PAD)
    acc = (acc * (scale * 0.6931471805599453)).to(query_gradient.dtype.element_ty)
    tl.store(query_gradient + place[:, None] * DIM + dims[None, :], acc, mask=live[:, None] & (dims < DIM)[None, :])
    tl.store(gate_gradient + place, gate_acc, mask=live)


@triton.jit
def _key_tiles(
    key_acc, value_acc, key, value, columns, query, upstream, gate, lse, delta, pairs, low, high, limit, group, groups,
    scale, keys, query_row, query_head, mask, mask_row, mask_column, offset, window,
    REPEATS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, VDIM: tl.constexpr, VPAD: tl.constexpr,
    BLOCK_M: tl.constexpr, CHECKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What the pairs from `low` to `high` add to the gradients of a tile of keys and values; none from `limit` on.

    A pair beyond the limit has no weights, because its log-sum-exp is taken for inf.
    """
    for begin in range(low, high, BLOCK_M):
        index = begin + tl.arange(0, BLOCK_M)
        live = index < limit
        pair = tl.load(pairs + index, mask=live, other=0)
        rows = pair // REPEATS
        heads = group * REPEATS + pair % REPEATS
        place = rows.to(tl.int64) * (groups * REPEATS) + heads
        tile = gather_rows(query, rows, heads, live, query_row, query_head, DIM, PAD)
        towards = gather_rows(upstream, rows, heads, live, groups * REPEATS * VDIM, VDIM, VDIM, VPAD)
        sums = tl.load(lse + place, mask=live, other=float("inf"))
        factor = tl.load(gate + place, mask=live, other=0.0)
        sum_of = tl.load(delta + place, mask=live, other=0.0)
        logits = tl.dot(key, tl.trans(tile), input_precision="ieee")
        if CHECKED:
            seen = visible(
                tl.where(live, rows, -1), columns, keys, mask, mask_row, mask_column, offset, window,
                CAUSAL, WINDOWED, MASKED,
            )  # fmt: skip
            logits = tl.where(tl.trans(seen), logits, float("-inf"))
        weights = tl.exp2(logits * scale - sums[None, :])
        value_acc = tl.dot((weights * factor[None, :]).to(towards.dtype), towards, value_acc, input_precision="ieee")
        pull = tl.dot(value, tl.trans(towards), input_precision="ieee")
        slope = weights * (pull * factor[None, :] - sum_of[None, :])
        key_acc = tl.dot(slope.to(tile.dtype), tile, key_acc, input_precision="ieee")
    return key_acc, value_acc


@triton.jit
def _rows_that_see(first, last, bound_row, queries, begin, end):
    """From which row on, and up to which one, any sees a key from `begin` to `end`, by the bounds of a mask."""
    lowest = queries
    highest = 0
    for start in range(0, queries, 1024):
        rows = start + tl.arange(0, 1024)
        inside = rows < queries
        useful = inside & (tl.load(last + rows * bound_row, mask=inside, other=0) > begin)
        useful = useful & (tl.load(first + rows * bound_row, mask=inside, other=0) < end)
        lowest = tl.minimum(lowest, tl.min(tl.where(useful, rows, queries), axis=0))
        highest = tl.maximum(highest, tl.max(tl.where(useful, rows + 1, 0), axis=0))
    return tl.minimum(lowest, highest), highest


@triton.jit(do_not_specialize=VARYING)
def _keys(
    query, key, value, gate, upstream, lse, delta, key_gradient, value_gradient, pairs, starts,
    scale, queries, keys, groups,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    mask, mask_batch, mask_row, mask_column, first, last, bound_batch, bound_row, offset, window,
    REPEATS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, VDIM: tl.constexpr, VPAD: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr, PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of keys and values, from all pairs that see any of it."""
    blocks = tl.cdiv(keys, BLOCK_N)
    program = tl.program_id(0) // blocks
    begin = (tl.program_id(0) % blocks) * BLOCK_N  # early keys are seen by most rows: they go first
    batch = (program // groups).to(tl.int64)
    group = program % groups
    columns = begin + tl.arange(0, BLOCK_N)
    inside = columns < keys
    key += batch * key_batch + group.to(tl.int64) * key_head
    value += batch * value_batch + group.to(tl.int64) * value_head
    key_tile = load_rows(key, begin, key_row, keys, BLOCK_N, DIM, PAD, True)
    value_tile = load_rows(value, begin, value_row, keys, BLOCK_N, VDIM, VPAD, True)
    end = tl.minimum(begin + BLOCK_N, keys)

    # rows that see any of the keys, and among them those that see all
    low, full_low, full_high, high = 0, 0, queries, queries
    if CAUSAL:
        low = tl.maximum(low, begin - offset)
        full_low = tl.maximum(full_low, end - 1 - offset)
    if WINDOWED:
        low = tl.maximum(low, begin - offset - window + 1)
        high = tl.minimum(high, end - 1 - offset + window)
        full_low = tl.maximum(full_low, end - offset - window)
        full_high = tl.minimum(full_high, begin - offset + window)
    if MASKED:
        mask += batch * mask_batch
        if PER_ROW:
            low, high = _rows_that_see(
                first + batch * bound_batch, last + batch * bound_batch, bound_row, queries, begin, end
            )
            full_low = high
        else:
            real = tl.load(mask + columns.to(tl.int64) * mask_column, mask=inside, other=0) != 0
            inside = inside & real
            high = tl.where(tl.max(real.to(tl.int32), axis=0) > 0, high, low)
    high = tl.maximum(tl.minimum(high, queries), 0)
    low = tl.minimum(tl.maximum(low, 0), high)
    full_low = tl.minimum(tl.maximum(full_low, low), high)
    full_high = tl.minimum(tl.maximum(full_high, full_low), high)

    # the same as places in the list
    starts += program.to(tl.int64) * (queries + 1)
    pairs += program.to(tl.int64) * queries * REPEATS
    low = tl.load(starts + low)
    limit = tl.load(starts + high)
    full_low = low + tl.cdiv(tl.load(starts + full_low) - low, BLOCK_M) * BLOCK_M
    full_high = tl.load(starts + full_high)
    if WINDOWED:
        full_high = full_low + tl.maximum(full_high - full_low, 0) // BLOCK_M * BLOCK_M

    query += batch * query_batch
    base = batch * queries * groups * REPEATS
    upstream += base * VDIM
    gate += base
    lse += base
    delta += base
    key_acc = tl.zeros([BLOCK_N, PAD], tl.float32)
    value_acc = tl.zeros([BLOCK_N, VPAD], tl.float32)
    if CAUSAL or WINDOWED or (MASKED and PER_ROW):
        key_acc, value_acc = _key_tiles(
            key_acc, value_acc, key_tile, value_tile, columns, query, upstream, gate, lse, delta, pairs,
            low, tl.minimum(full_low, limit), limit, group, groups, scale, keys, query_row, query_head,
            mask, mask_row, mask_column, offset, window,
            REPEATS, DIM, PAD, VDIM, VPAD, BLOCK_M, True, CAUSAL, WINDOWED, MASKED and PER_ROW,
        )  # fmt: skip
    key_acc, value_acc = _key_tiles(
        key_acc, value_acc, key_tile, value_tile, columns, query, upstream, gate, lse, delta, pairs,
        full_low, full_high, limit, group, groups, scale, keys, query_row, query_head,
        mask, mask_row, mask_column, offset, window,
        REPEATS, DIM, PAD, VDIM, VPAD, BLOCK_M, False, CAUSAL, WINDOWED, MASKED and PER_ROW,
    )  # fmt: skip
    if WINDOWED:
        key_acc, value_acc = _key_tiles(
            key_acc, value_acc, key_tile, value_tile, columns, query, upstream, gate, lse, delta, pairs,
            full_high, limit, limit, group, groups, scale, keys, query_row, query_head,
            mask, mask_row, mask_column, offset, window,
            REPEATS, DIM, PAD, VDIM, VPAD, BLOCK_M, True, CAUSAL, WINDOWED, MASKED and PER_ROW,
        )  # fmt: skip

    # a key that is padding came along in its block: nobody sees it
    key_acc = tl.where(inside[:, None], key_acc * (scale * 0.6931471805599453), 0.0)
    value_acc = tl.where(inside[:, None], value_acc, 0.0)
    place = (batch * keys + columns) * groups + group
    dims = tl.arange(0, PAD)
    tl.store(
        key_gradient + place[:, None] * DIM + dims[None, :],
        key_acc.to(key_gradient.dtype.element_ty),
        mask=(columns < keys)[:, None] & (dims < DIM)[None, :],
    )
    vdims = tl.arange(0, VPAD)
    tl.store(
        value_gradient + place[:, None] * VDIM + vdims[None, :],
        value_acc.to(value_gradient.dtype.element_ty),
        mask=(columns < keys)[:, None] & (vdims < VDIM)[None, :],
    )


def backward(
    upstream: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    mask: KeyMask,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of what `forward` takes.

    Args:
        upstream: `(B, Tq, H, Dv)`, contiguous.
        query: as given to `forward`.
        key: as given to `forward`.
        value: as given to `forward`.
        gate: as given to `forward`.
        mask: as given to `forward`.
        scaling: as given to `forward`.
        output: as it returned it.
        lse: as it returned it.

    Returns:
        Of queries `(B, Tq, H, D)`, keys `(B, Tk, G, D)`, values `(B, Tk, G, Dv)` and gates `(B, Tq, H)`.
    """
    batch, queries, heads = gate.shape
    groups, keys, dim = value.shape[1:]
    query_gradient = query.new_zeros(batch, queries, heads, query.shape[-1])
    gate_gradient = torch.zeros_like(gate)
    key_gradient = key.new_empty(batch, keys, groups, key.shape[-1])
    value_gradient = value.new_empty(batch, keys, groups, dim)
    delta = torch.empty_like(lse)
    with on_device(query):
        pairs, starts = selected_pairs(gate, groups)
        operands = {
            **arguments(query, key, value, mask, scaling),
            "gate": gate,
            "upstream": upstream,
            "lse": lse,
            "delta": delta,
            "pairs": pairs,
            "starts": starts,
        }
        launch(
            *(_queries, "queries", lambda sizes: batch * groups * triton.cdiv(pairs.shape[1], sizes["BLOCK_M"])),
            *(operands,),
            output=output,
            query_gradient=query_gradient,
            gate_gradient=gate_gradient,
        )
        launch(
            *(_keys, "keys", lambda sizes: batch * groups * triton.cdiv(keys, sizes["BLOCK_N"])),
            *(operands,),
            key_gradient=key_gradient,
            value_gradient=value_gradient,
        )
    return query_gradient, key_gradient, value_gradient, gate_gradient
