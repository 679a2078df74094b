"""Triton's kernels of attention with few queries: `selected_attention`, and `attention_with_lse` while generating.

All query heads of a kv head share a tile, so that keys and values are read once, and several programs share out the
keys of one kv head: few sequences would leave most of a GPU idle otherwise. A second kernel merges their parts.

Rows are scaled by whole powers of two, as in `split_attention_triton`, and parts are merged by them. Imports triton.
"""

# mypy: disable-error-code="no-untyped-def"
from typing import Any

import torch
import triton
import triton.language as tl

from .backend import on_device, rowwise
from .key_mask import KeyMask
from .split_attention_launch import mask_arguments, sizes_of, strides_of
from .split_attention_tiles_triton import LN_2, load_rows, seen
from .tiles import key_range
from .tuning import Launch, bucket, processors, run_chosen, tile_width

SPLITS = 64  # at most, of the keys of a kv head
VARYING = ["queries", "keys", "offset", "window", "splits", "pages_batch", "pages_head"]  # change from token to token


@triton.jit
def part_of_keys(low, high, split, splits, BLOCK_N: tl.constexpr):
    """From which key on, and up to which one, a program goes through those from `low` to `high`; in whole tiles."""
    tiles = tl.cdiv(tl.maximum(high - low, 0), BLOCK_N)
    return low + tiles * split // splits * BLOCK_N, low + tiles * (split + 1) // splits * BLOCK_N


@triton.jit
def columns_of(pages, places, end, keys, PAGE: tl.constexpr, PAGED: tl.constexpr):
    """Which keys stand at some places of a list of pages, or are these places themselves; `keys` from `end` on."""
    if PAGED:
        page = tl.load(pages + places // PAGE, mask=places < end, other=-1)
        there = (page >= 0) & (page < tl.cdiv(keys, PAGE))
        return tl.where(there, page * PAGE + places % PAGE, keys)
    return tl.where(places < end, places, keys)


@triton.jit(do_not_specialize=VARYING)
def decode_kernel(
    query,
    key,
    value,
    output,
    lse,
    totals,
    masses,
    tops,
    pages,
    counts,
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
    output_batch,
    output_head,
    output_token,
    pages_batch,
    pages_head,
    counts_batch,
    counts_head,
    mask_batch,
    mask_row,
    mask_column,
    bound_batch,
    bound_row,
    groups,
    queries,
    keys,
    offset,
    window,
    splits,
    scale,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    MASKED: tl.constexpr,
    PER_ROW: tl.constexpr,
    PAGED: tl.constexpr,
    OUTPUT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (batch, kv head, part of its keys): all queries of all its query heads."""
    split = tl.program_id(0) % splits
    place = (tl.program_id(0) // splits).to(tl.int64)
    batch = place // groups
    group = place % groups
    index = tl.arange(0, BLOCK_M)
    rows = index // GROUP
    heads = group * GROUP + index % GROUP
    live = rows < queries
    key += batch * key_batch + group * key_head
    value += batch * value_batch + group * value_head
    mask += batch * mask_batch
    first += batch * bound_batch
    last += batch * bound_batch
    if PAGED:
        pages += batch * pages_batch + group * pages_head
        low = 0
        high = tl.load(counts + batch * counts_batch + group * counts_head) * PAGE
    else:
        low, high = key_range(rows, live, keys, first, last, bound_row, offset, window, CAUSAL, WINDOWED, MASKED)
        low = low // BLOCK_N * BLOCK_N

    own = batch * query_batch + heads * query_head + rows.to(tl.int64) * query_token
    dims = tl.arange(0, BLOCK_D)[None, :]
    some = tl.load(query + own[:, None] + dims, mask=live[:, None] & (dims < DIM), other=0.0)
    total = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    start, end = part_of_keys(low, high, split, splits, BLOCK_N)
    high = tl.minimum(high, end)
    # one tile at least, of which nothing is seen: a loop that may be skipped makes the products wait for each other
    end = tl.maximum(end, start + 1)
    tl.assume(end > start)
    for begin in range(start, end, BLOCK_N):
        columns = columns_of(pages, begin + tl.arange(0, BLOCK_N), high, keys, PAGE, PAGED)
        tile = load_rows(key, columns, keys, key_token, DIM, BLOCK_D, False)
        logits = tl.dot(some, tl.trans(tile), input_precision="ieee")
        allowed = seen(
            rows[:, None], columns[None, :], queries, keys, mask, mask_row, mask_column, offset, window,
            CAUSAL, WINDOWED, MASKED, PER_ROW,
        )  # fmt: skip
        logits = tl.where(allowed, logits, float("-inf"))
        higher = tl.maximum(top, tl.ceil(tl.max(logits, axis=1) * scale))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        powers = tl.exp2(logits * scale - shift[:, None])
        less = tl.exp2(top - shift)
        mass = mass * less + tl.sum(powers, axis=1)
        if OUTPUT:
            values = load_rows(value, columns, keys, value_token, DIM_V, BLOCK_V, False)
            total = tl.dot(powers.to(values.dtype), values, total * less[:, None], input_precision="ieee")
        top = higher

    line = (batch * groups * GROUP + heads) * queries + rows
    dims = tl.arange(0, BLOCK_V)[None, :]
    inside = live[:, None] & (dims < DIM_V)
    if SPLIT:
        part = line * splits + split
        tl.store(masses + part, mass, mask=live)
        tl.store(tops + part, top, mask=live)
        if OUTPUT:
            tl.store(totals + part[:, None] * DIM_V + dims, total, mask=inside)
    else:
        some_seen = mass > 0.0
        mass = tl.where(some_seen, mass, 1.0)
        tl.store(lse + line, tl.where(some_seen, (top + tl.log2(mass)) * LN_2, float("-inf")), mask=live)
        if OUTPUT:
            own = batch * output_batch + heads * output_head + rows.to(tl.int64) * output_token
            tl.store(output + own[:, None] + dims, (total / mass[:, None]).to(output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def merge_kernel(
    output,
    lse,
    totals,
    masses,
    tops,
    output_batch,
    output_head,
    output_token,
    heads,
    queries,
    splits,
    DIM_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    OUTPUT: tl.constexpr,
    MOST: tl.constexpr,
):
    """One program per query and head: the parts of its keys put together."""
    line = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, MOST)
    part = line * splits + index
    there = index < splits
    parts = tl.load(tops + part, mask=there, other=float("-inf"))
    top = tl.max(parts, axis=0)
    weights = tl.exp2(parts - tl.where(top == float("-inf"), 0.0, top))
    mass = tl.sum(weights * tl.load(masses + part, mask=there, other=0.0), axis=0)
    some_seen = mass > 0.0
    mass = tl.where(some_seen, mass, 1.0)
    tl.store(lse + line, tl.where(some_seen, (top + tl.log2(mass)) * LN_2, float("-inf")))
    if OUTPUT:
        dims = tl.arange(0, BLOCK_V)
        inside = there[:, None] & (dims < DIM_V)[None, :]
        tile = tl.load(totals + part[:, None] * DIM_V + dims[None, :], mask=inside, other=0.0)
        merged = tl.sum(weights[:, None] * tile, axis=0) / mass
        output += line // queries // heads * output_batch + line // queries % heads * output_head
        output += line % queries * output_token
        tl.store(output + dims, merged.to(output.dtype.element_ty), mask=dims < DIM_V)


def launches(dtype: torch.dtype, dim: int, rows: int) -> list[Launch]:
    """Launch settings for a head dim and as many rows as the tile has."""
    width = tile_width(dim)
    if dtype == torch.float32:
        blocks = {"BLOCK_N": 32 if width <= 64 else 16}
        return [Launch(blocks, num_warps=warps, num_stages=1) for warps in ((4, 8) if rows < 64 else (8,))]
    blocks = {"BLOCK_N": 128 if width <= 64 and rows < 64 else 64 if width <= 128 else 32}
    return [Launch(blocks, num_warps=warps, num_stages=3 if rows < 64 else 2) for warps in (4, 8)]


def shares(device: torch.device, programs: int, tiles: int) -> int:
    """Into how many parts to cut the keys of a kv head, so that all processors have work."""
    return max(1, min(2 * processors(device, otherwise=8) // programs, tiles, SPLITS))


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    scaling: float,
    mask: KeyMask,
    *,
    pages: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    page: int = 1,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Attention `(B, H, Tq, Dv)` (`None` without values) and log-sum-exp `(B, H, Tq)`, float32.

    Args:
        query: `(B, H, Tq, D)`, which `are_few`.
        key: `(B, G, Tk, D)`.
        value: `(B, G, Tk, Dv)`.
        scaling: factor of the logits, positive.
        mask: which keys are seen.
        pages: `(B or 1, G or 1, N)` int32: the pages that are read; `None`: all keys are.
        counts: `(B or 1, G or 1)` int32: how many of them.
        page: keys of a page.
        dtype: of the output.
    """
    query, key = rowwise(query), rowwise(key)
    value = None if value is None else rowwise(value)
    batch, heads, queries, _ = query.shape
    groups, keys = key.shape[1:3]
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    output = None
    if value is not None:
        output = query.new_empty(batch, queries, heads, value.shape[-1], dtype=dtype).transpose(1, 2)
    values, outputs = (key if value is None else value), (lse[..., None] if output is None else output)
    block = max(16, triton.next_power_of_2(queries * heads // groups))
    most = keys if pages is None else pages.shape[-1] * page
    strides = strides_of(query=query, key=key, value=values, output=outputs)
    sizes = sizes_of(query, key, values, scaling)
    del sizes["heads"], sizes["group"]
    given = {
        **_page_arguments(pages, counts, page, batch, groups, lse),
        **mask_arguments(mask, lse),
        **strides,
        **sizes,
    }

    def run(settings: Launch) -> Any:
        splits = shares(query.device, batch * groups, triton.cdiv(most, settings.blocks["BLOCK_N"]))
        totals = masses = tops = lse
        if splits > 1:
            masses, tops = (lse.new_empty(*lse.shape, splits) for _ in range(2))
            totals = masses if value is None else lse.new_empty(*lse.shape, splits, values.shape[-1])
        parts = {"output": outputs, "lse": lse, "totals": totals, "masses": masses, "tops": tops}
        compiled = decode_kernel[(batch * groups * splits,)](
            query=query,
            key=key,
            value=values,
            **parts,
            **given,
            groups=groups,
            splits=splits,
            GROUP=heads // groups,
            OUTPUT=value is not None,
            SPLIT=splits > 1,
            BLOCK_M=block,
            **settings.arguments(),
        )
        if splits > 1:
            merge_kernel[(lse.numel(),)](
                **parts,
                **{name: stride for name, stride in strides.items() if name.startswith("output")},
                heads=heads,
                queries=queries,
                splits=splits,
                DIM_V=sizes["DIM_V"],
                BLOCK_V=sizes["BLOCK_V"],
                OUTPUT=value is not None,
                MOST=SPLITS,
            )
        return compiled

    shape = {"rows": block, "keys": bucket(most), "lines": bucket(batch * groups), "paged": pages is not None}
    shape |= {"dim": sizes["DIM"], "dim_v": sizes["DIM_V"], "dtype": query.dtype, "output": value is not None}
    shape |= {name: given[name] for name in ("CAUSAL", "WINDOWED", "MASKED", "PER_ROW")}
    candidates = launches(query.dtype, max(sizes["DIM"], sizes["DIM_V"]), block)
    with on_device(query):
        run_chosen("decode", shape, candidates, query.device, run)
    return output, lse


def _page_arguments(
    pages: torch.Tensor | None, counts: torch.Tensor | None, page: int, batch: int, groups: int, other: torch.Tensor
) -> dict[str, Any]:
    """What the kernel takes of a list of pages; `other` stands for tensors that are not there."""
    names = ("pages_batch", "pages_head", "counts_batch", "counts_head")
    if pages is None or counts is None:
        return {"pages": other, "counts": other, **dict.fromkeys(names, 0), "PAGE": 1, "PAGED": False}
    pages, counts = rowwise(pages).expand(batch, groups, -1), counts.expand(batch, groups)
    strides = dict(zip(names, (*pages.stride()[:2], *counts.stride()), strict=True))
    return {"pages": pages, "counts": counts, **strides, "PAGE": page, "PAGED": True}
