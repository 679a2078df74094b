"""Triton's kernels of `split_attention`, forward.

Two kernels. The first is flash attention over all keys, which keeps the log-sum-exp. The second adds up the keys of the
set, given that log-sum-exp: it reads a compact list of them, so that it costs their share of the keys. One kernel with
two accumulators would need twice the registers for its tile, and the set before the log-sum-exp, which ACT does not
have.

Differences of the two must be good to the last digit of float32, although weights are rounded to half precision before
they are multiplied by values: ACT divides `output - part` by what is left of the row. Rows are therefore scaled by
whole powers of two, not by their largest weight: then both kernels round a weight to the same digits.
"""

# mypy: disable-error-code="no-untyped-def"
import functools

import torch
import triton
import triton.language as tl

from .backend import rowwise
from .decoding_triton import attend
from .key_mask import KeyMask
from .rows import are_few
from .split_attention_launch import launch, list_arguments, mask_arguments, sizes_of, strides_of
from .split_attention_tiles_triton import LN_2, full_keys, load_lse, load_rows, seen, store_rows
from .tiles import VARYING, key_range
from .tuning import Launch, settings


@triton.jit
def _add_keys(
    total,
    mass,
    top,
    queries_tile,
    key,
    value,
    key_token,
    value_token,
    rows,
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
    FULL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add keys from `start` to `end` to rows: of values, of weights, and the power of two that both are relative to."""
    for begin in range(start, end, BLOCK_N):
        columns = begin + tl.arange(0, BLOCK_N)
        tile = load_rows(key, columns, keys, key_token, DIM, BLOCK_D, FULL)
        logits = tl.dot(queries_tile, tl.trans(tile), input_precision="ieee")
        if not FULL:
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
            values = load_rows(value, columns, keys, value_token, DIM_V, BLOCK_V, FULL)
            total = total * less[:, None]
            total = tl.dot(powers.to(values.dtype), values, total, input_precision="ieee")
        top = higher
    return total, mass, top


@triton.jit(do_not_specialize=VARYING)
def attention_kernel(
    query,
    key,
    value,
    output,
    lse,
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
    DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    MASKED: tl.constexpr,
    PER_ROW: tl.constexpr,
    OUTPUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (batch, query head, block of queries): attention over all keys and its log-sum-exp."""
    count = tl.cdiv(queries, BLOCK_M)
    block = count - 1 - tl.program_id(0) % count  # causal: the last ones see most, and come first
    place = (tl.program_id(0) // count).to(tl.int64)
    batch = place // heads
    head = place % heads
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head // group * key_head
    value += batch * value_batch + head // group * value_head
    output += batch * output_batch + head * output_head
    lse += place * queries
    mask += batch * mask_batch
    first += batch * bound_batch
    last += batch * bound_batch

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    lowest = block * BLOCK_M
    highest = tl.minimum(lowest + BLOCK_M, queries) - 1
    start, end = key_range(
        rows, rows < queries, keys, first, last, bound_row, offset, window, CAUSAL, WINDOWED, MASKED
    )  # fmt: skip
    start = start // BLOCK_N * BLOCK_N
    if PER_ROW:
        # one tile at least, of which nothing is seen: a loop that may be skipped makes the products wait for each other
        end = tl.maximum(end, start + 1)
        tl.assume(end > start)
    begins, ends = full_keys(
        lowest, highest, start, end, keys, offset, window, CAUSAL, WINDOWED, MASKED, BLOCK_N
    )  # fmt: skip
    if PER_ROW:
        ends = start
    tile = load_rows(query, rows, queries, query_token, DIM, BLOCK_D, False)
    total = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if WINDOWED:
        total, mass, top = _add_keys(
            total, mass, top, tile, key, value, key_token, value_token, rows, start, begins, queries, keys,
            mask, mask_row, mask_column, offset, window, scale, DIM, DIM_V, BLOCK_D, BLOCK_V,
            CAUSAL, WINDOWED, MASKED, PER_ROW, OUTPUT, False, BLOCK_N,
        )  # fmt: skip
    if not MASKED:
        total, mass, top = _add_keys(
            total, mass, top, tile, key, value, key_token, value_token, rows, begins, ends, queries, keys,
            mask, mask_row, mask_column, offset, window, scale, DIM, DIM_V, BLOCK_D, BLOCK_V,
            CAUSAL, WINDOWED, MASKED, PER_ROW, OUTPUT, True, BLOCK_N,
        )  # fmt: skip
    total, mass, top = _add_keys(
        total, mass, top, tile, key, value, key_token, value_token, rows, ends, end, queries, keys,
        mask, mask_row, mask_column, offset, window, scale, DIM, DIM_V, BLOCK_D, BLOCK_V,
        CAUSAL, WINDOWED, MASKED, PER_ROW, OUTPUT, False, BLOCK_N,
    )  # fmt: skip
    some = mass > 0.0
    mass = tl.where(some, mass, 1.0)
    tl.store(lse + rows, tl.where(some, (top + tl.log2(mass)) * LN_2, float("-inf")), mask=rows < queries)
    if OUTPUT:
        store_rows(output, rows, queries, output_token, total / mass[:, None], DIM_V, BLOCK_V)


@triton.jit(do_not_specialize=VARYING)
def key_set_kernel(
    query,
    key,
    value,
    output,
    mass_of,
    lse,
    index,
    rank,
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
    list_batch,
    list_head,
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
    DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    MASKED: tl.constexpr,
    PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (batch, query head, block of queries): what the keys of a list give, under a known lse."""
    count = tl.cdiv(queries, BLOCK_M)
    block = count - 1 - tl.program_id(0) % count
    place = (tl.program_id(0) // count).to(tl.int64)
    batch = place // heads
    head = place % heads
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head // group * key_head
    value += batch * value_batch + head // group * value_head
    output += batch * output_batch + head * output_head
    index += batch * list_batch + head * list_head
    rank += batch * list_batch + head * list_head
    lse += place * queries
    mass_of += place * queries
    mask += batch * mask_batch
    first += batch * bound_batch
    last += batch * bound_batch

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    low, high = key_range(rows, rows < queries, keys, first, last, bound_row, offset, window, CAUSAL, WINDOWED, MASKED)
    start = tl.load(rank + low - 1, mask=(low > 0) & (low <= keys), other=0)
    end = tl.load(rank + high - 1, mask=high > 0, other=0)
    tile = load_rows(query, rows, queries, query_token, DIM, BLOCK_D, False)
    base = load_lse(lse, rows, queries)
    base = tl.where(base == float("inf"), 0.0, base)
    shift = tl.ceil(base)
    total = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    for begin in range(start, end, BLOCK_N):
        members = begin + tl.arange(0, BLOCK_N)
        columns = tl.load(index + members, mask=members < end, other=2147483647)
        keys_tile = load_rows(key, columns, keys, key_token, DIM, BLOCK_D, False)
        logits = tl.dot(tile, tl.trans(keys_tile), input_precision="ieee")
        allowed = seen(
            rows[:, None], columns[None, :], queries, keys, mask, mask_row, mask_column, offset, window,
            CAUSAL, WINDOWED, MASKED, PER_ROW,
        )  # fmt: skip
        powers = tl.where(allowed, tl.exp2(logits * scale - shift[:, None]), 0.0)
        mass += tl.sum(powers, axis=1)
        values = load_rows(value, columns, keys, value_token, DIM_V, BLOCK_V, False)
        total = tl.dot(powers.to(values.dtype), values, total, input_precision="ieee")
    more = tl.exp2(shift - base)
    tl.store(mass_of + rows, mass * more, mask=rows < queries)
    store_rows(output, rows, queries, output_token, total * more[:, None], DIM_V, BLOCK_V)


@functools.cache
def launches(dtype: torch.dtype, dim: int, per_row: bool = False) -> tuple[Launch, ...]:
    """Tiles worth trying, the default first; `per_row`: with a mask row per query, whose places take registers."""
    if dtype == torch.float32:
        sizes = [(32, 32, 4, 1), (32, 32, 8, 1)]
    elif per_row and dim > 64:
        sizes = [(128, 32, 8, 2), (64, 32, 8, 2)] if dim <= 128 else [(64, 32, 8, 2), (128, 32, 8, 2)]
    elif dim > 128:
        sizes = [(128, 32, 8, 2), (64, 32, 4, 2), (64, 32, 8, 2), (128, 64, 8, 2)]
    elif dim > 64:
        sizes = [(128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 8, 2), (128, 128, 8, 2)]
    else:
        sizes = [(128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3), (64, 64, 4, 3)]
    return settings(sizes, dim, dtype, streamed=("BLOCK_N", 2), held=("BLOCK_M", 1))


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None, scaling: float, mask: KeyMask
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Attention `(B, H, Tq, Dv)` (`None` without values) and log-sum-exp `(B, H, Tq)`, both float32."""
    if are_few(query, key):
        return attend(query, key, value, scaling, mask)
    query, key = rowwise(query), rowwise(key)
    value = None if value is None else rowwise(value)
    batch, heads, queries, _ = query.shape
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    output = None
    if value is not None:
        output = query.new_empty(batch, queries, heads, value.shape[-1], dtype=torch.float32).transpose(1, 2)
    values, outputs = (key if value is None else value), (query if output is None else output)
    arguments = {
        "query": query,
        "key": key,
        "value": values,
        "output": outputs,
        "lse": lse,
        **mask_arguments(mask, lse),
        **strides_of(query=query, key=key, value=values, output=outputs),
        **sizes_of(query, key, values, scaling),
        "OUTPUT": value is not None,
    }
    launch(
        attention_kernel,
        "attention" if value is not None else "log_sum_exp",
        lambda settings: triton.cdiv(queries, settings.blocks["BLOCK_M"]) * batch * heads,
        arguments,
        launches(query.dtype, max(query.shape[-1], values.shape[-1]), bool(arguments["PER_ROW"])),
        query.device,
    )
    return output, lse


def key_set_part(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lse: torch.Tensor,
    index: torch.Tensor,
    rank: torch.Tensor,
    scaling: float,
    mask: KeyMask,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(B, H, Tq, Dv)` and `(B, H, Tq)`: output and mass of listed keys, float32; see `compact`."""
    query, key, value = rowwise(query), rowwise(key), rowwise(value)
    batch, heads, queries, _ = query.shape
    mass = torch.empty_like(lse, dtype=torch.float32, memory_format=torch.contiguous_format)
    output = query.new_empty(batch, queries, heads, value.shape[-1], dtype=torch.float32).transpose(1, 2)
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "output": output,
        "mass_of": mass,
        "lse": lse.float().contiguous(),
        **list_arguments(index, rank, batch, heads),
        **mask_arguments(mask, mass),
        **strides_of(query=query, key=key, value=value, output=output),
        **sizes_of(query, key, value, scaling),
    }
    launch(
        key_set_kernel,
        "key_set",
        lambda settings: triton.cdiv(queries, settings.blocks["BLOCK_M"]) * batch * heads,
        arguments,
        launches(query.dtype, max(query.shape[-1], value.shape[-1])),
        query.device,
    )
    return output, mass
