"""Triton's kernels of the forward of `routed_attention`: blocks of selected pairs, and decoding. Imports triton."""

# mypy: disable-error-code="no-untyped-def"
from typing import Any

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
    launches,
    load_rows,
    pairs_of,
    selected_pairs,
    shape_of,
    store_rows,
)
from .tiles import VARYING, key_range, visible
from .tuning import Launch, padded_splits, processors, run_chosen, tile_widths

FEW_PAIRS = 64  # up to so many pairs per kv head, selected or not, are one tile: decoding
LONG = 2048  # keys, from which on several launches that share them out are taken for one that does not; not measured


@triton.jit
def _tiles(
    acc, more, top, total, query, rest, key, value, low, high, rows, scale, keys, key_row, value_row, mask, mask_row,
    mask_column, offset, window, DIM: tl.constexpr, PAD: tl.constexpr, REST: tl.constexpr, VDIM: tl.constexpr,
    VPAD: tl.constexpr, VREST: tl.constexpr, BLOCK_N: tl.constexpr, CHECKED: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, MASKED: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """The online softmax over the keys from `low` to `high`; logits are in base 2."""
    for begin in range(low, high, BLOCK_N):
        columns = begin + tl.arange(0, BLOCK_N)
        tile = load_rows(key, begin, key_row, keys, BLOCK_N, DIM, PAD, CHECKED)
        logits = tl.dot(query, tl.trans(tile), input_precision="ieee")
        if REST:
            tile = load_rows(key + PAD, begin, key_row, keys, BLOCK_N, DIM - PAD, REST, CHECKED)
            logits = tl.dot(rest, tl.trans(tile), logits, input_precision="ieee")
        if CHECKED:
            seen = visible(
                rows, columns, keys, mask, mask_row, mask_column, offset, window, CAUSAL, WINDOWED, MASKED, PER_ROW
            )
            logits = tl.where(seen, logits, float("-inf"))
        elif MASKED:
            real = tl.load(mask + columns.to(tl.int64) * mask_column) != 0
            logits = tl.where(real[None, :], logits, float("-inf"))
        peak = tl.maximum(top, tl.max(logits, axis=1) * scale)
        shift = tl.where(peak == float("-inf"), 0.0, peak)  # nothing seen so far: -inf less -inf would be NaN
        weights = tl.exp2(logits * scale - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = acc * shrink[:, None]
        tile = load_rows(value, begin, value_row, keys, BLOCK_N, VDIM, VPAD, CHECKED)
        acc = tl.dot(weights.to(tile.dtype), tile, acc, input_precision="ieee")
        if VREST:
            more = more * shrink[:, None]
            tile = load_rows(value + VPAD, begin, value_row, keys, BLOCK_N, VDIM - VPAD, VREST, CHECKED)
            more = tl.dot(weights.to(tile.dtype), tile, more, input_precision="ieee")
        top = peak
    return acc, more, top, total


@triton.jit
def _attend(
    query, rest, key, value, rows, live, from_key, to_key, scale, keys, key_row, value_row, mask, mask_row, mask_column,
    first, last, bound_row, offset, window, DIM: tl.constexpr, PAD: tl.constexpr, REST: tl.constexpr,
    VDIM: tl.constexpr, VPAD: tl.constexpr, VREST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """Attention of a tile of queries to the keys of a range: `(M, VPAD)` and `(M, VREST)` (16 where that is 0), and the
    log-sum-exp in base 2.

    A row that sees nothing has zeros, and inf: its weights exp2(logit - inf) are then zeros in the backward too.
    """
    acc = tl.zeros([BLOCK_M, VPAD], tl.float32)
    more = tl.zeros([BLOCK_M, VREST if VREST else 16], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    low, high = key_range(rows, live, keys, first, last, bound_row, offset, window, CAUSAL, WINDOWED, MASKED)
    high = tl.minimum(high, to_key)
    if MASKED and PER_ROW:
        # one tile at least, of which nothing is seen: a loop that may be skipped makes the products wait for each other
        low = tl.minimum(tl.maximum(low, from_key), to_key - 1) // BLOCK_N * BLOCK_N
        high = tl.maximum(high, low + 1)
        tl.assume(high > low)
        end = low
    else:
        low = tl.minimum(tl.maximum(low, from_key), to_key) // BLOCK_N * BLOCK_N
        begin, end = interior(rows, live, keys, low, high, offset, window, CAUSAL, WINDOWED, BLOCK_N)
        if WINDOWED:
            acc, more, top, total = _tiles(
                acc, more, top, total, query, rest, key, value, low, tl.minimum(begin, high), rows, scale, keys,
                key_row, value_row, mask, mask_row, mask_column, offset, window, DIM, PAD, REST, VDIM, VPAD, VREST,
                BLOCK_N, True, CAUSAL, WINDOWED, MASKED, PER_ROW,
            )  # fmt: skip
        acc, more, top, total = _tiles(
            acc, more, top, total, query, rest, key, value, begin, end, rows, scale, keys, key_row, value_row,
            mask, mask_row, mask_column, offset, window, DIM, PAD, REST, VDIM, VPAD, VREST, BLOCK_N,
            False, CAUSAL, WINDOWED, MASKED, PER_ROW,
        )  # fmt: skip
    acc, more, top, total = _tiles(
        acc, more, top, total, query, rest, key, value, end, high, rows, scale, keys, key_row, value_row,
        mask, mask_row, mask_column, offset, window, DIM, PAD, REST, VDIM, VPAD, VREST, BLOCK_N,
        True, CAUSAL, WINDOWED, MASKED, PER_ROW,
    )  # fmt: skip
    some = total > 0
    divisor = tl.where(some, total, 1.0)[:, None]
    acc, more = acc / divisor, more / divisor
    return acc, more, tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), float("inf"))


@triton.jit(do_not_specialize=VARYING)
def _prefill(
    query, key, value, gate, output, lse, pairs, starts, scale, queries, keys, groups,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    mask, mask_batch, mask_row, mask_column, first, last, bound_batch, bound_row, offset, window,
    REPEATS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, REST: tl.constexpr, VDIM: tl.constexpr,
    VPAD: tl.constexpr, VREST: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr,
    PER_ROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of a list's pairs."""
    program, block, count = block_of_pairs(starts, queries, REPEATS, BLOCK_M)
    if block < 0:
        return
    batch, group, rows, heads, live = pairs_of(pairs, program, block, count, queries, groups, REPEATS, BLOCK_M)
    query += batch * query_batch
    some = gather_rows(query, rows, heads, live, query_row, query_head, DIM, PAD)
    rest = gather_rows(query + PAD, rows, heads, live, query_row, query_head, DIM - PAD, REST) if REST else some
    if MASKED:
        mask += batch * mask_batch
        first += batch * bound_batch
        last += batch * bound_batch
    own_keys = key + batch * key_batch + group.to(tl.int64) * key_head
    own_values = value + batch * value_batch + group.to(tl.int64) * value_head
    acc, more, sums = _attend(
        some, rest, own_keys, own_values, rows, live,
        0, keys, scale, keys, key_row, value_row, mask, mask_row, mask_column, first, last, bound_row, offset, window,
        DIM, PAD, REST, VDIM, VPAD, VREST, BLOCK_M, BLOCK_N, CAUSAL, WINDOWED, MASKED, PER_ROW,
    )  # fmt: skip
    place = (batch * queries + rows) * groups * REPEATS + heads
    factor = tl.load(gate + place, mask=live, other=0.0)
    store_rows(output, place * VDIM, live, acc * factor[:, None], VDIM, VPAD)
    if VREST:
        store_rows(output + VPAD, place * VDIM, live, more * factor[:, None], VDIM - VPAD, VREST)
    tl.store(lse + place, sums, mask=live)


@triton.jit(do_not_specialize=VARYING)
def _decode(
    query, key, value, gate, parts, sums, chunk, splits, scale, queries, keys, groups,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    mask, mask_batch, mask_row, mask_column, first, last, bound_batch, bound_row, offset, window,
    REPEATS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, REST: tl.constexpr, VDIM: tl.constexpr,
    VPAD: tl.constexpr, VREST: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr,
    PER_ROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All pairs of a kv head, and a part of its keys, which nobody reads where no pair is selected."""
    program = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    batch = (program // groups).to(tl.int64)
    group = program % groups
    index = tl.arange(0, BLOCK_M)
    live = index < queries * REPEATS
    heads = group * REPEATS + index % REPEATS
    place = (batch * queries + index // REPEATS) * groups * REPEATS + heads
    live = live & (tl.load(gate + place, mask=live, other=0.0) != 0)
    rows = tl.where(live, index // REPEATS, -1)
    query += batch * query_batch
    some = gather_rows(query, rows, heads, live, query_row, query_head, DIM, PAD)
    rest = gather_rows(query + PAD, rows, heads, live, query_row, query_head, DIM - PAD, REST) if REST else some
    if MASKED:
        mask += batch * mask_batch
        first += batch * bound_batch
        last += batch * bound_batch
    own_keys = key + batch * key_batch + group.to(tl.int64) * key_head
    own_values = value + batch * value_batch + group.to(tl.int64) * value_head
    acc, more, part = _attend(
        some, rest, own_keys, own_values, rows, live,
        split * chunk, (split + 1) * chunk, scale, keys, key_row, value_row, mask, mask_row, mask_column, first, last,
        bound_row, offset, window,
        DIM, PAD, REST, VDIM, VPAD, VREST, BLOCK_M, BLOCK_N, CAUSAL, WINDOWED, MASKED, PER_ROW,
    )  # fmt: skip
    place = place * splits + split
    store_rows(parts, place * VDIM, live, acc, VDIM, VPAD)
    if VREST:
        store_rows(parts + VPAD, place * VDIM, live, more, VDIM - VPAD, VREST)
    tl.store(sums + place, part, mask=live)


@triton.jit(do_not_specialize=VARYING)
def _merge(parts, sums, gate, output, lse, splits, SPLITS: tl.constexpr, VDIM: tl.constexpr, VPAD: tl.constexpr):
    """One pair's parts put together by their log-sum-exps; zeros where it is not selected."""
    pair = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, VPAD)
    factor = tl.load(gate + pair)
    place = pair * splits + tl.arange(0, SPLITS)
    chosen = tl.arange(0, SPLITS) < tl.where(factor != 0, splits, 0)
    logs = tl.load(sums + place, mask=chosen, other=float("inf"))
    logs = tl.where(logs == float("inf"), float("-inf"), logs)
    top = tl.max(logs, axis=0)
    weights = tl.exp2(logs - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weights, axis=0)
    some = total > 0
    divisor = tl.where(some, total, 1.0)
    tile = tl.load(
        parts + place[:, None] * VDIM + dims[None, :], mask=chosen[:, None] & (dims < VDIM)[None, :], other=0.0
    )
    result = tl.sum(weights[:, None] * tile, axis=0) / divisor * factor
    whole = tl.where(factor != 0, tl.where(some, top + tl.log2(divisor), float("inf")), 0.0)
    tl.store(output + pair * VDIM + dims, result.to(output.dtype.element_ty), mask=dims < VDIM)
    tl.store(lse + pair, whole)


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gate: torch.Tensor, mask: KeyMask, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the pairs that a gate keeps.

    Args:
        query: as of `routed_attention`, the last dimension contiguous.
        key: likewise, of the dtype of the query.
        value: likewise, of the dtype of the query.
        gate: `(B, Tq, H)` float32, contiguous.
        mask: which keys are seen.
        scaling: factor of the logits, positive.

    Returns:
        `(B, Tq, H, Dv)`, and in float32 `(B, Tq, H)`: the log-sum-exp in base 2; inf where a row sees nothing, 0 where
        it is not selected.
    """
    queries, few = gate.shape[1], _queries_at_a_time(gate, value)
    with on_device(query):
        if few == 0:
            return _prefill_all(query, key, value, gate, mask, scaling)
        if few >= queries:
            return _decode_all(query, key, value, gate, mask, scaling)
        parts = [slice(start, start + few) for start in range(0, queries, few)]
        done = [
            _decode_all(query[:, :, part], key, value, gate[:, part].contiguous(), _of_queries(mask, part), scaling)
            for part in parts
        ]
        return torch.cat([output for output, _ in done], dim=1), torch.cat([lse for _, lse in done], dim=1)


def _queries_at_a_time(gate: torch.Tensor, value: torch.Tensor) -> int:
    """For how many queries keys are shared out among programs; 0 where a program goes through all keys of its pairs.

    Those that are one tile decode. More do so tile by tile, where one program per tile would leave half of the
    processors idle or more: a few dozen queries behind a long cache.
    """
    batch, queries, heads = gate.shape
    groups, keys = value.shape[1:3]
    few = FEW_PAIRS // (heads // groups)
    if queries <= few:
        return queries
    tiles = batch * groups * triton.cdiv(queries, few) if few else 0
    alone = keys >= LONG and 0 < 2 * tiles <= processors(value.device, 4)
    return few if alone else 0


def _of_queries(mask: KeyMask, part: slice) -> KeyMask:
    """The mask of some queries."""
    mask_rows, first, last = (one if one is None or one.shape[1] == 1 else one[:, part] for one in mask[:3])
    return mask._replace(mask=mask_rows, first=first, last=last, offset=mask.offset + part.start)


def _prefill_all(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gate: torch.Tensor, mask: KeyMask, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`forward` with a program per block of selected pairs."""
    batch, queries, heads = gate.shape
    groups, dim = value.shape[1], value.shape[3]
    output, lse = value.new_zeros(batch, queries, heads, dim), torch.zeros_like(gate)
    pairs, starts = selected_pairs(gate, groups)
    operands = arguments(query, key, value, mask, scaling)
    # vectors in two tiles where that is less than one; decoding computes little, and takes more registers so
    widths = (*tile_widths(query.shape[3]), *tile_widths(dim))
    operands |= dict(zip(("PAD", "REST", "VPAD", "VREST"), widths, strict=True))
    launch(
        *(_prefill, "prefill", lambda sizes: batch * groups * triton.cdiv(pairs.shape[1], sizes["BLOCK_M"])),
        operands,
        gate=gate,
        output=output,
        lse=lse,
        pairs=pairs,
        starts=starts,
    )
    return output, lse


def _decode_all(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gate: torch.Tensor, mask: KeyMask, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`forward` of so few queries that all pairs of a kv head are one tile, with several programs for its keys."""
    batch, queries, heads = gate.shape
    groups, keys, dim = value.shape[1:]
    operands = arguments(query, key, value, mask, scaling) | {"REST": 0, "VREST": 0}
    output, lse = value.new_empty(batch, queries, heads, dim), torch.empty_like(gate)
    few = max(16, triton.next_power_of_2(queries * heads // groups))

    def decode(chosen: Launch) -> Any:
        block = chosen.blocks["BLOCK_N"]
        splits = _splits(batch * groups, keys, block, query.device)
        chunk = triton.cdiv(triton.cdiv(keys, splits), block) * block
        parts, sums = gate.new_empty(*gate.shape, splits, dim), gate.new_empty(*gate.shape, splits)
        compiled = _decode[(batch * groups * splits,)](
            **operands,
            gate=gate,
            parts=parts,
            sums=sums,
            chunk=chunk,
            splits=splits,
            **{**chosen.arguments(), "BLOCK_M": few},
        )
        _merge[(gate.numel(),)](
            parts, sums, gate, output, lse, splits, SPLITS=padded_splits(splits), VDIM=dim, VPAD=operands["VPAD"]
        )
        return compiled

    candidates = launches("decode", max(query.shape[-1], dim), query.dtype)
    run_chosen("routed_attention_decode", shape_of(operands), candidates, query.device, decode)
    return output, lse


def _splits(programs: int, keys: int, block: int, device: torch.device) -> int:
    """In how many parts the keys are read, so that all processors have work, also where few heads are selected."""
    wanted = min(4 * processors(device, 4) // max(1, programs), keys // (2 * block), 64)
    return 1 << max(0, wanted.bit_length() - 1)
