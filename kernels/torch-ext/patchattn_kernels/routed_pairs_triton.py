"""What Triton's kernels of `routed_attention` share: lists of selected pairs, and how they are launched.

A pair is a query row and one of the query heads of a kv head. The selected pairs of a sequence and kv head stand in one
list, sorted by row, so that a program's pairs share their keys and values whatever the share of selected ones. Lists
are made on the device, and programs beyond a list's end return at once: nothing waits for the device. Imports triton.
"""

# mypy: disable-error-code="no-untyped-def"
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from .key_mask import KeyMask, strides_but_of_one
from .tiles import VARYING
from .tuning import Launch, bucket, run_chosen, settings, tile_width

# Pairs, keys, warps and stages by the head dim up to which they are meant; the first of each is the default, and the
# second what it falls to where a mask makes it spill registers on compute capability 9.0. None of the defaults needs
# more shared memory than 8.0 has. Decoding takes all pairs of a kv head, whatever is said here.
_LAUNCHES = {
    "prefill": {
        64: [(128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 4, 3)],
        128: [(128, 64, 8, 3), (64, 64, 4, 3), (128, 32, 8, 2), (128, 128, 8, 2)],
        256: [(128, 32, 8, 2), (64, 32, 8, 2), (64, 32, 4, 3)],
    },
    "decode": {64: [(16, 128, 4, 3), (16, 64, 4, 3)], 128: [(16, 64, 4, 3)], 256: [(16, 32, 4, 3)]},
    "queries": {
        64: [(128, 64, 8, 3), (64, 64, 4, 3)],
        128: [(128, 64, 8, 2), (128, 32, 8, 3), (64, 32, 4, 3)],
        256: [(64, 32, 8, 2)],
    },
    "keys": {
        64: [(64, 64, 4, 3), (64, 64, 8, 2), (64, 128, 8, 3)],
        128: [(64, 64, 8, 2), (32, 64, 8, 2), (32, 64, 4, 3)],
        256: [(16, 64, 8, 2), (32, 64, 8, 2)],
    },
}


@triton.jit
def load_rows(
    base, begin, stride, count, SIZE: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, CHECKED: tl.constexpr
):
    """(SIZE, PAD) consecutive vectors of length DIM; zeros beyond that and, where CHECKED, beyond `count` vectors."""
    rows = tl.arange(0, SIZE)
    dims = tl.arange(0, PAD)
    place = base + (begin + rows).to(tl.int64)[:, None] * stride + dims[None, :]
    if CHECKED:
        tile = tl.load(place, mask=(begin + rows < count)[:, None] & (dims < DIM)[None, :], other=0.0)
    elif DIM < PAD:
        tile = tl.load(place, mask=(dims < DIM)[None, :], other=0.0)
    else:
        tile = tl.load(place)
    return tile


@triton.jit
def gather_rows(base, rows, heads, live, row, head, DIM: tl.constexpr, PAD: tl.constexpr):
    """(M, PAD) vectors of some rows and heads; zeros where not `live`. `row` and `head` are strides."""
    dims = tl.arange(0, PAD)
    place = rows.to(tl.int64) * row + heads.to(tl.int64) * head
    return tl.load(base + place[:, None] + dims[None, :], mask=live[:, None] & (dims < DIM)[None, :], other=0.0)


@triton.jit
def store_rows(base, places, live, tile, DIM: tl.constexpr, PAD: tl.constexpr):
    """Write the `live` ones of (M, PAD) vectors to some places."""
    dims = tl.arange(0, PAD)
    place = base + places[:, None] + dims[None, :]
    tl.store(place, tile.to(base.dtype.element_ty), mask=live[:, None] & (dims < DIM)[None, :])


@triton.jit
def interior(
    rows, live, keys, low, high, offset, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_N: tl.constexpr
):
    """From which tile of keys on, and up to which one, all live rows see all keys, but for the mask's."""
    lowest = tl.min(tl.where(live, rows, 2147483647 - 1), axis=0)
    highest = tl.max(tl.where(live, rows, -1), axis=0)
    begin = low
    end = tl.minimum(high, keys)
    if CAUSAL:
        end = tl.minimum(end, lowest + offset + 1)
    if WINDOWED:
        begin = tl.maximum(begin, highest + offset - window + 1)
        end = tl.minimum(end, lowest + offset + window)
    begin = tl.cdiv(begin, BLOCK_N) * BLOCK_N
    end = tl.maximum(tl.maximum(end, 0) // BLOCK_N * BLOCK_N, begin)
    return begin, end


@triton.jit(do_not_specialize=VARYING)
def list_pairs(gate, pairs, starts, queries, groups, REPEATS: tl.constexpr, BLOCK: tl.constexpr):
    """The selected pairs `row * REPEATS + head in the group`, in order, and how many come before each row."""
    program = tl.program_id(0)
    batch = (program // groups).to(tl.int64)
    group = program % groups
    length = queries * REPEATS
    gate += batch * length * groups + group * REPEATS
    pairs += program.to(tl.int64) * length
    starts += program.to(tl.int64) * (queries + 1)
    count = 0
    for begin in range(0, length, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        row = index // REPEATS
        inside = index < length
        place = row.to(tl.int64) * groups * REPEATS + index % REPEATS
        chosen = (tl.load(gate + place, mask=inside, other=0.0) != 0).to(tl.int32)
        before = count + tl.cumsum(chosen, axis=0) - chosen
        tl.store(pairs + before, index, mask=chosen != 0)
        tl.store(starts + row, before, mask=inside & (index % REPEATS == 0))
        count += tl.sum(chosen, axis=0)
    tl.store(starts + queries, count)


@triton.jit
def block_of_pairs(starts, queries, REPEATS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Which list a program works on, which block of it, and the list's length; a negative block is none."""
    blocks = tl.cdiv(queries * REPEATS, BLOCK_M)
    program = tl.program_id(0) // blocks
    count = tl.load(starts + program.to(tl.int64) * (queries + 1) + queries)
    block = tl.cdiv(count, BLOCK_M) - 1 - tl.program_id(0) % blocks  # late rows see most keys: they go first
    return program, block, count


@triton.jit
def pairs_of(pairs, program, block, count, queries, groups, REPEATS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Batch, kv head, rows, query heads of a block of pairs, and which of them are; the rows of others are -1."""
    group = program % groups
    index = block * BLOCK_M + tl.arange(0, BLOCK_M)
    live = index < count
    pair = tl.load(pairs + program.to(tl.int64) * queries * REPEATS + index, mask=live, other=0)
    rows = tl.where(live, pair // REPEATS, -1)
    return (program // groups).to(tl.int64), group, rows, group * REPEATS + pair % REPEATS, live


@functools.cache
def launches(kernel: str, dim: int, dtype: torch.dtype) -> tuple[Launch, ...]:
    """Launch settings of a kernel (`prefill`, `decode`, `queries`, `keys`) for a head dim; the first is the default."""
    table, width = _LAUNCHES[kernel], tile_width(dim)
    sizes = table[min(size for size in table if width <= size)]
    if dtype == torch.float32:  # products without tensor cores
        size = 16 if width > 64 else 32
        sizes = [(size, size, 4, 2), (size, size, 8, 2)]
    streamed, held = [("BLOCK_N", 2), ("BLOCK_M", 1 if kernel in ("prefill", "decode") else 2)]
    if kernel == "keys":
        streamed, held = ("BLOCK_M", 2), ("BLOCK_N", 2)
    return settings(sizes, dim, dtype, streamed=streamed, held=held, in_two=kernel == "prefill")


def arguments(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: KeyMask, scaling: float
) -> dict[str, Any]:
    """What all kernels take of the operands."""
    groups, keys, value_dim = value.shape[1:]
    _, heads, queries, dim = query.shape
    strides = {
        f"{name}_{axis}": tensor.stride(number)
        for name, tensor in (("query", query), ("key", key), ("value", value))
        for number, axis in enumerate(("batch", "head", "row"))
    }
    return {
        "query": query,
        "key": key,
        "value": value,
        "scale": scaling / math.log(2),
        "queries": queries,
        "keys": keys,
        "groups": groups,
        **strides,
        **_mask_arguments(mask),
        "REPEATS": heads // groups,
        "DIM": dim,
        "PAD": tile_width(dim),
        "VDIM": value_dim,
        "VPAD": tile_width(value_dim),
    }


def _mask_arguments(mask: KeyMask) -> dict[str, Any]:
    numbers = {"mask_batch": 0, "mask_row": 0, "mask_column": 0, "bound_batch": 0, "bound_row": 0}
    if mask.mask is not None and mask.first is not None:
        steps = (*strides_but_of_one(mask.mask), *strides_but_of_one(mask.first))
        numbers = dict(zip(numbers, steps, strict=True))
    return {
        "mask": mask.mask,
        "first": mask.first,
        "last": mask.last,
        **numbers,
        "offset": mask.offset,
        "window": mask.window,
        "CAUSAL": mask.causal,
        "WINDOWED": mask.window > 0,
        "MASKED": mask.mask is not None,
        "PER_ROW": mask.mask is not None and mask.mask.shape[1] > 1,
    }


def shape_of(operands: dict[str, Any]) -> dict[str, Any]:
    """What the choice of launch settings depends on, of `arguments`."""
    query, key = operands["query"], operands["key"]
    return {
        **{name: operands[name] for name in ("CAUSAL", "WINDOWED", "MASKED", "PER_ROW")},
        "queries": bucket(query.shape[2]),
        "keys": bucket(key.shape[2]),
        "heads": bucket(query.shape[1]),
        "groups": key.shape[1],
        "dim": query.shape[3],
        "dtype": query.dtype,
    }


def launch(
    kernel: Any, name: str, blocks: Callable[[Mapping[str, int]], int], operands: dict[str, Any], **more: Any
) -> None:
    """Run a kernel with the launch settings for its operands; `blocks` gives the number of programs."""
    query = operands["query"]

    def run(chosen: Launch) -> Any:
        return kernel[(blocks(chosen.blocks),)](**operands, **more, **chosen.arguments())

    candidates = launches(name, max(operands["DIM"], operands["VDIM"]), query.dtype)
    run_chosen(f"routed_attention_{name}", shape_of(operands), candidates, query.device, run)


def selected_pairs(gate: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs of every kv head that a gate `(B, Tq, H)` keeps, in order, and how many come before each row.

    Returns:
        `(B * G, Tq * H / G)` int32, of which only the first ones are written, and `(B * G, Tq + 1)` int32.
    """
    batch, queries, heads = gate.shape
    length = queries * heads // groups
    pairs = gate.new_empty(batch * groups, length, dtype=torch.int32)
    starts = gate.new_empty(batch * groups, queries + 1, dtype=torch.int32)
    block = min(8192, max(16, triton.next_power_of_2(length)))
    list_pairs[(batch * groups,)](
        gate, pairs, starts, queries, groups, REPEATS=heads // groups, BLOCK=block, num_warps=max(1, block // 512)
    )
    return pairs, starts
