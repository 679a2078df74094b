"""Triton's kernel of block-sparse attention and its launch. Imports triton: imported when it runs.

Which keys a tile of queries needs is a sequence of key tiles: those of the sinks and then the recent ones, or those of
the listed blocks; one loop goes through it. Keys are counted by `order`: without padding it is their number plus 1.
"""

# mypy: disable-error-code="no-untyped-def"
import functools
from typing import Any

import torch
import triton
import triton.language as tl

from .backend import on_device, rowwise
from .block_lists import BlockLists, SinkAndRecent, key_order
from .key_mask import key_mask, strides_but_of_one
from .rows import AttentionRule
from .tiles import VARYING, visible
from .tuning import SMALLEST, Launch, bucket, padded_splits, processors, run_chosen, settings, tile_width

MOST = tl.constexpr(2**29)  # sizes above it are all keys; the sum of two stays in 32 bits
LOG2E = tl.constexpr(1.4426950408889634)
SPLITS = 32  # at most, of the keys of one query tile
FEW = 16  # queries, up to which it is decoding


@triton.jit
def counted(order, position, keys, PADDED: tl.constexpr):
    """How many real keys there are up to a position, itself included."""
    if PADDED:
        return tl.load(order + tl.minimum(tl.maximum(position, 0), keys - 1))
    return position + 1


@triton.jit
def after(places, count, keys, PADDED: tl.constexpr):
    """Where the first real key after `count` others is; `keys` if there is none."""
    count = tl.minimum(tl.maximum(count, 0), keys)
    if PADDED:
        return tl.load(places + count)
    return count


@triton.jit
def key_tiles(
    low, high, order, places, sinks, recent, keys, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, PADDED: tl.constexpr
):
    """Key tiles for own keys `low` to `high`: the first one of the sinks, how many, the first recent one, how many."""
    end = keys
    if CAUSAL:
        end = tl.minimum(high + 1, keys)
    sink_first = after(places, 0, keys, PADDED) // BLOCK_N
    sink_end = tl.minimum(after(places, sinks, keys, PADDED), end)
    sink_tiles = tl.where(sinks > 0, tl.maximum(tl.cdiv(sink_end, BLOCK_N) - sink_first, 0), 0)
    begin = after(places, counted(order, low, keys, PADDED) - recent, keys, PADDED)
    end = tl.minimum(end, after(places, counted(order, high, keys, PADDED) + recent - 1, keys, PADDED))
    recent_first = tl.maximum(begin // BLOCK_N, tl.where(sink_tiles > 0, sink_first + sink_tiles, 0))
    return sink_first, sink_tiles, recent_first, tl.maximum(tl.cdiv(end, BLOCK_N) - recent_first, 0)


@triton.jit
def list_row(batch, head, tile, list_batch, list_head, PER: tl.constexpr):
    """Which list is a tile's, where a block is `PER` tiles; lists of several batches or heads lie one after another."""
    return batch.to(tl.int64) * list_batch + head.to(tl.int64) * list_head + tile // PER


@triton.jit
def rows_of(base, rows, stride, limit, DIM: tl.constexpr, PAD: tl.constexpr):
    """`(rows, PAD)`: some rows of a matrix, zeros from `limit` and from DIM on."""
    dims = tl.arange(0, PAD)
    inside = (rows < limit)[:, None]
    if PAD != DIM:
        inside = inside & (dims < DIM)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + dims[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(base, tile, rows, stride, limit, DIM: tl.constexpr, PAD: tl.constexpr):
    """The inverse of `rows_of`."""
    dims = tl.arange(0, PAD)
    inside = (rows < limit)[:, None] & (dims < DIM)[None, :]
    place = base + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    tl.store(place, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def is_whole(begin, low, high, sinks, recent, keys, BLOCK_N: tl.constexpr, LISTED: tl.constexpr, CAUSAL: tl.constexpr):
    """Whether own keys `low` to `high` all see every key of a tile, where there is no mask and no window."""
    last = begin + BLOCK_N - 1
    whole = last < keys
    if CAUSAL:
        whole = whole & (last <= low)
    if not LISTED:
        near = high - begin < recent
        if not CAUSAL:
            near = near & (last - low < recent)
        whole = whole & ((last < sinks) | near)
    return whole


@triton.jit
def seen_pairs(
    rows, columns, order, mask, sinks, recent, queries, keys, offset, window, mask_row, mask_column,
    LISTED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr, PER_ROW: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """(M, N) which of some keys some queries see; rows past the last one are as the last one."""
    rows = tl.minimum(rows, queries - 1)
    seen = visible(rows, columns, keys, mask, mask_row, mask_column, offset, window, CAUSAL, WINDOWED, MASKED, PER_ROW)
    if not LISTED:
        number = counted(order, columns, keys, PADDED)[None, :]
        behind = counted(order, rows + offset, keys, PADDED)[:, None] - number
        seen = seen & ((number <= sinks) | ((behind < recent) & (behind > -recent)))
    return seen


@triton.jit
def place_of(tiles):
    """Which tile, which line (batch and head), and how many lines; all on the first axis: others end at 65,535."""
    return tl.program_id(0) % tiles, tl.program_id(0) // tiles, tl.num_programs(0) // tiles


@triton.jit(do_not_specialize=VARYING)
def attend(
    query, key, value, output, lse, first, second, order, places, mask, scale, heads, group, queries, keys, offset,
    window, width, list_batch, list_head, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    o_split, o_batch, o_head, o_row, order_batch, mask_batch, mask_row, mask_column,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, VDIM: tl.constexpr,
    VPAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LISTED: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, MASKED: tl.constexpr, PER_ROW: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    PACK: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of a tile of queries, over one of several parts of its sequence of key tiles.

    A tile is ROWS queries of PACK heads, which share a kv head and, where keys are listed, their lists. `first` and
    `second` are then the lists and their counts, else the sinks and the recent keys of every head.
    """
    tile, head_line, lines = place_of(tl.cdiv(queries, ROWS))
    tile = tl.cdiv(queries, ROWS) - 1 - tile  # with the most keys first, where it is causal
    head_line, lines = head_line * PACK, lines * PACK
    batch, head = head_line // heads, head_line % heads
    inner = tl.arange(0, BLOCK_M) // PACK
    rows = tl.where(inner < ROWS, tile * ROWS + inner, queries)
    member = tl.arange(0, BLOCK_M) % PACK if PACK > 1 else 0  # which of the heads a row is of
    own = (head + member)[:, None] if PACK > 1 else head
    low = tile * ROWS + offset
    high = tl.minimum(tile * ROWS + ROWS, queries) - 1 + offset
    order += batch.to(tl.int64) * order_batch
    places += batch.to(tl.int64) * (order_batch + (order_batch > 0))
    mask += batch.to(tl.int64) * mask_batch
    query += batch.to(tl.int64) * q_batch + own.to(tl.int64) * q_head
    key += batch.to(tl.int64) * k_batch + (head // group).to(tl.int64) * k_head
    value += batch.to(tl.int64) * v_batch + (head // group).to(tl.int64) * v_head
    sinks, recent, fewest_sinks, least_recent, sink_first, sink_tiles, recent_first = 0, 0, 0, 0, 0, 0, 0
    if LISTED:
        line = list_row(batch, head, tile, list_batch, list_head, BLOCK_Q // ROWS)
        tiles = tl.load(second + line) * (BLOCK_K // BLOCK_N)
        first += line * width
    else:
        sinks = tl.minimum(tl.load(first + own), MOST)
        recent = tl.minimum(tl.load(second + own), MOST)
        most_sinks, most_recent, fewest_sinks, least_recent = sinks, recent, sinks, recent
        if PACK > 1:
            most_sinks, most_recent = tl.max(sinks), tl.max(recent)
            fewest_sinks, least_recent = tl.min(sinks), tl.min(recent)
        sink_first, sink_tiles, recent_first, tiles = key_tiles(
            low, high, order, places, most_sinks, most_recent, keys, BLOCK_N, CAUSAL, PADDED
        )
        tiles += sink_tiles
    split, splits = tl.program_id(1), tl.num_programs(1)
    output += split.to(tl.int64) * o_split + batch.to(tl.int64) * o_batch + own.to(tl.int64) * o_head
    lse += (split.to(tl.int64) * lines + head_line + member) * queries
    first_step, end_step = tiles * split // splits, tiles * (split + 1) // splits
    if first_step >= end_step:
        store_rows(output, tl.zeros([BLOCK_M, VPAD], tl.float32), rows, o_row, queries, VDIM, VPAD)
        tl.store(lse + rows, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=rows < queries)
        return
    tl.assume(first_step < end_step)  # a loop that may be skipped makes the products wait for each other

    some = rows_of(query, rows, q_row, queries, DIM, PAD)
    acc = tl.zeros([BLOCK_M, VPAD], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for step in range(first_step, end_step):
        if LISTED:
            begin = tl.load(first + step // (BLOCK_K // BLOCK_N)) * BLOCK_K + step % (BLOCK_K // BLOCK_N) * BLOCK_N
        else:
            begin = tl.where(step < sink_tiles, sink_first + step, recent_first + step - sink_tiles) * BLOCK_N
        columns = begin + tl.arange(0, BLOCK_N)
        keys_of = rows_of(key, columns, k_row, keys, DIM, PAD)
        logits = tl.dot(some, tl.trans(keys_of), input_precision="ieee") * scale
        partly = True
        if not MASKED and not WINDOWED:
            partly = not is_whole(begin, low, high, fewest_sinks, least_recent, keys, BLOCK_N, LISTED, CAUSAL)
        if partly:
            seen = seen_pairs(
                rows, columns, order, mask, sinks, recent, queries, keys, offset, window, mask_row, mask_column,
                LISTED, CAUSAL, WINDOWED, MASKED, PER_ROW, PADDED,
            )  # fmt: skip
            logits = tl.where(seen, logits, float("-inf"))
        peak = tl.maximum(top, tl.max(logits, axis=1))
        shift = tl.where(peak == float("-inf"), 0.0, peak)  # nothing seen so far: -inf less -inf would be NaN
        weights = tl.exp2(logits - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(weights, axis=1)
        values_of = rows_of(value, columns, v_row, keys, VDIM, VPAD)
        acc = tl.dot(weights.to(values_of.dtype), values_of, acc * shrink[:, None], input_precision="ieee")
        top = peak
    some_seen = total > 0
    acc = acc / tl.where(some_seen, total, 1.0)[:, None]
    sums = tl.where(some_seen, (top + tl.log2(tl.where(some_seen, total, 1.0))) / LOG2E, float("-inf"))
    store_rows(output, acc, rows, o_row, queries, VDIM, VPAD)
    tl.store(lse + rows, sums, mask=rows < queries)


@triton.jit(do_not_specialize=VARYING)
def merge(
    outputs, sums, output, lse, splits, heads, queries, o_batch, o_head, o_row,
    VDIM: tl.constexpr, VPAD: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One row's parts into one by their log-sum-exp: `(splits, B, H, Tq, Dv)` and `(splits, B, H, Tq)`."""
    row, line, lines = place_of(queries)
    batch, head = line // heads, line % heads
    index = tl.arange(0, SPLITS)
    places = (index.to(tl.int64) * lines + line) * queries + row
    parts = tl.load(sums + places, mask=index < splits, other=float("-inf"))
    peak = tl.max(parts, axis=0)
    weights = tl.exp2((parts - tl.where(peak == float("-inf"), 0.0, peak)) * LOG2E)
    total = tl.sum(weights, axis=0)
    parts_of = rows_of(outputs, places, VDIM, splits.to(tl.int64) * lines * queries, VDIM, VPAD)
    merged = tl.sum(parts_of * weights[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    dims = tl.arange(0, VPAD)
    output += batch.to(tl.int64) * o_batch + head.to(tl.int64) * o_head + row.to(tl.int64) * o_row
    tl.store(output + dims, merged.to(output.dtype.element_ty), mask=dims < VDIM)
    whole = tl.where(total > 0, peak + tl.log2(tl.where(total > 0, total, 1.0)) / LOG2E, float("-inf"))
    tl.store(lse + line.to(tl.int64) * queries + row, whole)


@functools.cache
def launches(dim: int, dtype: torch.dtype, few: bool, per_row: bool = False) -> tuple[Launch, ...]:
    """Candidates for the forward kernel, the default first.

    `few`: up to FEW rows, as in decoding; `per_row`: with a mask row per query, whose places take registers.
    """
    if dtype == torch.float32:
        sizes = [(16 if few else 32, 32, warps, 2) for warps in (4, 8)]
    elif few:  # decoding reads, and hardly computes
        sizes = [(16, 64, 4, 3), (16, 128, 4, 2)] if dim <= 128 else [(16, 64, 4, 2), (16, 32, 4, 3)]
    elif per_row and dim > 64:
        sizes = [(64, 32, 8, 2), (64, 16, 8, 2)] if dim <= 128 else [(64, 16, 8, 2)]
    elif dim <= 64:
        sizes = [(128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2)]
    elif dim <= 128:
        sizes = [(128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 8, 2), (128, 64, 8, 2), (128, 128, 8, 2)]
    else:
        sizes = [(64, 64, 4, 2), (128, 64, 8, 2), (64, 32, 4, 3), (64, 32, 8, 2)]
    return settings(sizes, dim, dtype, streamed=("BLOCK_N", 2), held=("BLOCK_M", 1))


def visibility(
    keep: SinkAndRecent | BlockLists, rule: AttentionRule, queries: int, keys: int, device: torch.device
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the kernels take of a rule and of what is kept: tensors and numbers, and constants."""
    given = key_mask(rule, queries, keys, device)
    listed = isinstance(keep, BlockLists)
    first, second = keep[0].contiguous(), keep[1].contiguous()
    numbers: dict[str, Any] = {"first": first, "second": second, "offset": given.offset, "window": given.window}
    numbers |= list_numbers(keep) if isinstance(keep, BlockLists) else {"width": 0, "list_batch": 0, "list_head": 0}
    mask = given.mask
    strides = (0, 0, 0) if mask is None else strides_but_of_one(mask)
    numbers |= dict(zip(("mask_batch", "mask_row", "mask_column"), strides, strict=True))
    numbers["mask"] = first if mask is None else mask
    order = places = first
    padded = mask is not None and not listed
    if padded:
        order = key_order(rule, queries, keys, device).contiguous()
        count = torch.arange(1, keys + 2, dtype=torch.int32, device=device).expand(len(order), -1).contiguous()
        places = torch.searchsorted(order, count, out_int32=True)
    numbers |= {"order": order, "places": places, "order_batch": keys if padded and len(order) > 1 else 0}
    constants: dict[str, Any] = {
        "LISTED": listed,
        "CAUSAL": given.causal,
        "WINDOWED": given.window > 0,
        "MASKED": mask is not None,
    }
    constants |= {"PER_ROW": mask is not None and mask.shape[1] > 1, "PADDED": padded}
    sizes = (keep.block_q, keep.block_k) if isinstance(keep, BlockLists) else (0, 0)
    constants |= {"BLOCK_Q": sizes[0], "BLOCK_K": sizes[1]}
    return numbers, constants


def shape_of(query: torch.Tensor, value: torch.Tensor, constants: dict[str, Any]) -> dict[str, Any]:
    """What the choice of launch settings depends on."""
    batch, heads, rows, dim = query.shape
    sizes = {"heads": bucket(batch * heads), "queries": bucket(rows), "keys": bucket(value.shape[2])}
    return {**sizes, "dim": dim, "vdim": value.shape[-1], "dtype": query.dtype, **constants}


def fitted(launch: Launch, constants: dict[str, Any]) -> dict[str, int]:
    """A launch's arguments, its tiles no larger than the blocks of lists."""
    arguments = launch.arguments()
    if constants["LISTED"]:
        arguments["BLOCK_N"] = min(arguments["BLOCK_N"], constants["BLOCK_K"])
        arguments["BLOCK_M"] = min(arguments["BLOCK_M"], max(16, constants["BLOCK_Q"]))
    return arguments


def list_numbers(lists: BlockLists) -> dict[str, Any]:
    """Lists, and how far apart those of batches and heads are, in lists: 0 where they share them."""
    batch, heads, blocks, width = lists.indices.shape
    strides = {"list_batch": heads * blocks if batch > 1 else 0, "list_head": blocks if heads > 1 else 0}
    return {"first": lists.indices.contiguous(), "second": lists.counts.contiguous(), "width": width, **strides}


def shares(device: torch.device, programs: int, tiles: int) -> int:
    """Into how many parts to cut a loop over tiles, where so few programs would leave a device idle."""
    return max(1, min(2 * processors(device, 8) // programs, tiles, SPLITS))


def packed(numbers: dict[str, Any], constants: dict[str, Any], queries: int, group: int) -> int:
    """How many query heads of a kv head share a tile: all while decoding, so that keys are read once for them.

    Of a large group a part. Lists must be the same for these heads; of sinks and recent keys the most are read.
    """
    if queries > FEW or (constants["LISTED"] and numbers["list_head"]):
        return 1
    return max(size for size in range(1, SMALLEST + 1) if group % size == 0)


def rows_of_tile(rows: int, block_q: int, pack: int) -> int:
    """How many queries a tile of so many rows has, where it has as many heads: a power of two, as blocks of lists."""
    most = bucket(rows // pack + 1) // 2
    return min(most, block_q or most)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keep: SinkAndRecent | BlockLists,
    rule: AttentionRule,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `(B, H, Tq, Dv)` in the dtype of the operands and log-sum-exp `(B, H, Tq)` in float32."""
    query, key, value = rowwise(query), rowwise(key), rowwise(value)
    batch, heads, rows, dim = query.shape
    keys, width = key.shape[2], value.shape[-1]
    numbers, constants = visibility(keep, rule, rows, keys, query.device)
    group = heads // key.shape[1]
    constants["PACK"] = packed(numbers, constants, rows, group)
    output = value.new_empty(batch, rows, heads, width).transpose(1, 2)
    lse = query.new_empty(batch, heads, rows, dtype=torch.float32)

    def run(launch: Launch) -> Any:
        arguments = fitted(launch, constants)
        arguments["ROWS"] = rows_of_tile(arguments["BLOCK_M"], constants["BLOCK_Q"], constants["PACK"])
        tiles, lines = triton.cdiv(rows, arguments["ROWS"]), batch * heads
        programs = tiles * lines // constants["PACK"]
        most = numbers["width"] * constants["BLOCK_K"] if constants["LISTED"] else keys
        splits = shares(query.device, programs, triton.cdiv(most, arguments["BLOCK_N"]))
        parts, sums = output, lse
        if splits > 1:
            parts = query.new_empty(splits, batch, heads, rows, width, dtype=torch.float32)
            sums = query.new_empty(splits, batch, heads, rows, dtype=torch.float32)
        compiled = attend[(programs, splits)](
            query, key, value, parts, sums, scale=rule.scaling * LOG2E.value, heads=heads, group=group,
            queries=rows, keys=keys, **dict(zip(("q_batch", "q_head", "q_row"), query.stride(), strict=False)),
            **dict(zip(("k_batch", "k_head", "k_row"), key.stride(), strict=False)),
            **dict(zip(("v_batch", "v_head", "v_row"), value.stride(), strict=False)),
            o_split=parts.stride(0) if splits > 1 else 0, o_batch=parts.stride(-4), o_head=parts.stride(-3),
            o_row=parts.stride(-2), DIM=dim, PAD=tile_width(dim), VDIM=width, VPAD=tile_width(width),
            **numbers, **constants, **arguments,
        )  # fmt: skip
        if splits > 1:
            merge[(rows * lines,)](
                parts, sums, output, lse, splits, heads, rows, *output.stride()[:3], VDIM=width, VPAD=tile_width(width),
                SPLITS=padded_splits(splits),
            )  # fmt: skip
        return compiled

    with on_device(query):
        candidates = launches(max(dim, width), query.dtype, rows <= FEW, constants["PER_ROW"])
        run_chosen("block_sparse_attention", shape_of(query, value, constants), candidates, query.device, run)
    return output, lse
