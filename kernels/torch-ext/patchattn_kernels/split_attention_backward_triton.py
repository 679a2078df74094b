"""Triton's kernels of `split_attention`, backward.

With weights w = exp(logits - lse), the gradient of the logits is `w (gradient of output * value + extra)` for both
forward kernels. Only `extra`, a number per row, is different: `gradient of lse - gradient of output * output` for all
keys, and the gradient of the mass for a set of keys, whose lse is an operand.
"""

# mypy: disable-error-code="no-untyped-def"
import functools

import torch
import triton
import triton.language as tl

from . import split_attention_keys_triton
from .backend import rowwise
from .key_mask import KeyMask
from .split_attention_launch import launch, list_arguments, mask_arguments, sizes_of, strides_of
from .split_attention_tiles_triton import full_keys, load_lse, load_rows, seen, store_rows
from .tiles import VARYING, key_range
from .tuning import Launch, settings


@triton.jit
def _query_gradient_of_keys(
    total,
    tile,
    given,
    base,
    extra,
    key,
    value,
    index,
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
    LISTED: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    for begin in range(start, end, BLOCK_N):
        columns = begin + tl.arange(0, BLOCK_N)
        if LISTED:
            columns = tl.load(index + columns, mask=columns < end, other=2147483647)
        keys_tile = load_rows(key, columns, keys, key_token, DIM, BLOCK_D, FULL)
        logits = tl.dot(tile, tl.trans(keys_tile), input_precision="ieee")
        powers = tl.exp2(logits * scale - base[:, None])
        if not FULL:
            allowed = seen(
                rows[:, None], columns[None, :], queries, keys, mask, mask_row, mask_column, offset, window,
                CAUSAL, WINDOWED, MASKED, PER_ROW,
            )  # fmt: skip
            powers = tl.where(allowed, powers, 0.0)
        change = extra[:, None]
        if OUTPUT:
            values = load_rows(value, columns, keys, value_token, DIM_V, BLOCK_V, FULL)
            change = tl.dot(given, tl.trans(values), input_precision="ieee") + change
        total = tl.dot((powers * change).to(keys_tile.dtype), keys_tile, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=VARYING)
def query_gradient_kernel(
    query,
    key,
    value,
    given,
    lse,
    extra,
    query_gradient,
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
    given_batch,
    given_head,
    given_token,
    query_gradient_batch,
    query_gradient_head,
    query_gradient_token,
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
    """One program per (batch, query head, block of queries): the queries' gradient."""
    count = tl.cdiv(queries, BLOCK_M)
    block = count - 1 - tl.program_id(0) % count
    place = (tl.program_id(0) // count).to(tl.int64)
    batch = place // heads
    head = place % heads
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head // group * key_head
    value += batch * value_batch + head // group * value_head
    given += batch * given_batch + head * given_head
    query_gradient += batch * query_gradient_batch + head * query_gradient_head
    index += batch * list_batch + head * list_head
    rank += batch * list_batch + head * list_head
    mask += batch * mask_batch
    first += batch * bound_batch
    last += batch * bound_batch

    lowest = block * BLOCK_M
    rows = lowest + tl.arange(0, BLOCK_M)
    start, end = key_range(
        rows, rows < queries, keys, first, last, bound_row, offset, window, CAUSAL, WINDOWED, MASKED
    )  # fmt: skip
    tile = load_rows(query, rows, queries, query_token, DIM, BLOCK_D, False)
    base = load_lse(lse + place * queries, rows, queries)
    more = tl.load(extra + place * queries + rows, mask=rows < queries, other=0.0)
    upper = tile  # stands for what is not given
    if OUTPUT:
        upper = load_rows(given, rows, queries, given_token, DIM_V, BLOCK_V, False)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if LISTED:
        low = tl.load(rank + start - 1, mask=(start > 0) & (start <= keys), other=0)
        high = tl.load(rank + end - 1, mask=end > 0, other=0)
        if PER_ROW:  # a loop that may be skipped makes the products wait for each other
            if low >= high:
                store_rows(query_gradient, rows, queries, query_gradient_token, total, DIM, BLOCK_D)
                return
            tl.assume(high > low)
        total = _query_gradient_of_keys(
            total, tile, upper, base, more, key, value, index, key_token, value_token, rows, low, high, queries, keys,
            mask, mask_row, mask_column, offset, window, scale, DIM, DIM_V, BLOCK_D, BLOCK_V,
            CAUSAL, WINDOWED, MASKED, PER_ROW, OUTPUT, LISTED, False, BLOCK_N,
        )  # fmt: skip
    else:
        highest = tl.minimum(lowest + BLOCK_M, queries) - 1
        start = start // BLOCK_N * BLOCK_N
        if PER_ROW:  # as in the forward
            end = tl.maximum(end, start + 1)
            tl.assume(end > start)
        begins, ends = full_keys(
            lowest, highest, start, end, keys, offset, window, CAUSAL, WINDOWED, MASKED, BLOCK_N
        )  # fmt: skip
        if PER_ROW:
            ends = start
        if WINDOWED:
            total = _query_gradient_of_keys(
                total, tile, upper, base, more, key, value, index, key_token, value_token, rows, start, begins,
                queries, keys, mask, mask_row, mask_column, offset, window, scale, DIM, DIM_V, BLOCK_D, BLOCK_V,
                CAUSAL, WINDOWED, MASKED, PER_ROW, OUTPUT, LISTED, False, BLOCK_N,
            )  # fmt: skip
        if not MASKED:
            total = _query_gradient_of_keys(
                total, tile, upper, base, more, key, value, index, key_token, value_token, rows, begins, ends,
                queries, keys, mask, mask_row, mask_column, offset, window, scale, DIM, DIM_V, BLOCK_D, BLOCK_V,
                CAUSAL, WINDOWED, MASKED, PER_ROW, OUTPUT, LISTED, True, BLOCK_N,
            )  # fmt: skip
        total = _query_gradient_of_keys(
            total, tile, upper, base, more, key, value, index, key_token, value_token, rows, ends, end,
            queries, keys, mask, mask_row, mask_column, offset, window, scale, DIM, DIM_V, BLOCK_D, BLOCK_V,
            CAUSAL, WINDOWED, MASKED, PER_ROW, OUTPUT, LISTED, False, BLOCK_N,
        )  # fmt: skip
    store_rows(query_gradient, rows, queries, query_gradient_token, total * scaling, DIM, BLOCK_D)


@functools.cache
def launches(dtype: torch.dtype, dim: int) -> tuple[Launch, ...]:
    """Tiles worth trying, the default first."""
    if dtype == torch.float32:
        sizes = [(32, 32, 4, 1), (32, 32, 8, 1)]
    elif dim > 128:  # 64 queries and 8 warps would not spill, but their products would wait for each other
        sizes = [(64, 32, 4, 1), (128, 32, 8, 1)]
    else:
        sizes = [(128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2)]
    return settings(sizes, dim, dtype, streamed=("BLOCK_N", 2), held=("BLOCK_M", 2))


def attention_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    given: torch.Tensor | None,
    lse: torch.Tensor,
    extra: torch.Tensor,
    chosen: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    scaling: float,
    mask: KeyMask,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of queries, keys and values, in their dtypes.

    Args:
        query: as given to the forward.
        key: likewise.
        value: likewise; `None`: gradients of the log-sum-exp alone.
        given: `(B, H, Tq, Dv)` gradient of the output, `None` without values.
        lse: `(B, H, Tq)`.
        extra: `(B, H, Tq)`, see the top of this file.
        chosen: set, index and rank of its keys; all keys for `None`.
        scaling: factor of the logits.
        mask: who sees whom.
    """
    query, key = rowwise(query), rowwise(key)
    batch, heads, queries, dim = query.shape
    keys = key.shape[2]
    values = key if value is None else rowwise(value)
    upper = query if given is None or value is None else rowwise(given.to(value.dtype))
    arguments = {
        "query": query,
        "key": key,
        "value": values,
        "given": upper,
        "lse": lse.float().contiguous(),
        "extra": extra.float().contiguous(),
        **mask_arguments(mask, lse),
        **strides_of(query=query, key=key, value=values, given=upper),
        **sizes_of(query, key, values, scaling),
        "scaling": scaling,
        "OUTPUT": value is not None,
        "LISTED": chosen is not None,
    }
    widest = max(dim, values.shape[-1])
    query_gradient = _like(query)
    members, index, rank = chosen or (lse, lse, lse)
    lists = {"index": lse, "rank": lse, "list_batch": 0, "list_head": 0}
    launch(
        query_gradient_kernel,
        "query_gradient",
        lambda settings: -(-queries // settings.blocks["BLOCK_M"]) * batch * heads,
        {
            **arguments,
            "query_gradient": query_gradient,
            **strides_of(query_gradient=query_gradient),
            **(list_arguments(index, rank, batch, heads) if chosen else lists),
        },
        launches(query.dtype, widest),
        query.device,
    )
    key_gradient = _like(key)
    value_gradient = None if value is None else _like(value)
    target = key_gradient if value_gradient is None else value_gradient
    members = members.view(torch.uint8).expand(batch, heads, keys) if chosen else lse
    launch(
        split_attention_keys_triton.key_gradient_kernel,
        "key_gradient",
        lambda settings: -(-keys // settings.blocks["BLOCK_N"]) * batch * key.shape[1],
        {
            **arguments,
            "key_gradient": key_gradient,
            "value_gradient": target,
            **strides_of(key_gradient=key_gradient, value_gradient=target, chosen=members),
            "chosen": members,
        },
        split_attention_keys_triton.launches(query.dtype, widest),
        query.device,
    )
    return query_gradient, key_gradient, value_gradient


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """Unwritten, `(B, H, T, D)` with the heads of a token side by side."""
    return tensor.new_empty(tensor.transpose(1, 2).shape).transpose(1, 2)
