"""Parts of Triton's kernels that several operations share. Imports triton: import it where kernels are launched."""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

# Arguments that change from token to token. No kernel is compiled for those that are 1, nor for multiples of 16.
VARYING = ["queries", "keys", "offset", "window", "chunk", "splits", "width", "list_batch", "list_head", "order_batch"]


@triton.jit
def visible(
    rows,
    columns,
    keys,
    mask,
    mask_row,
    mask_column,
    offset,
    window,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    MASKED: tl.constexpr,
    PER_ROW: tl.constexpr = True,
):
    """(M, N) which of some keys some queries see; a query at -1 sees none. `mask` points to the batch's rows.

    Where the mask has one row for all queries, `PER_ROW` false reads it once.
    """
    inside = columns < keys
    seen = inside[None, :] & (rows >= 0)[:, None]
    own = rows + offset
    if CAUSAL:
        seen = seen & (columns[None, :] <= own[:, None])
    if WINDOWED:
        distance = own[:, None] - columns[None, :]
        seen = seen & (distance < window) & (distance > -window)
    if MASKED:
        if PER_ROW:
            place = rows.to(tl.int64)[:, None] * mask_row + columns.to(tl.int64)[None, :] * mask_column
            seen = seen & (tl.load(mask + place, mask=seen, other=0) != 0)
        else:
            seen = seen & (tl.load(mask + columns.to(tl.int64) * mask_column, mask=inside, other=0) != 0)[None, :]
    return seen


@triton.jit
def key_range(
    rows,
    live,
    keys,
    first,
    last,
    bound_row,
    offset,
    window,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """From which key on, and up to which one, the `live` ones of some queries see any; empty if none of them does."""
    start = 0
    end = keys
    lowest = tl.min(tl.where(live, rows, 2147483647 - 1), axis=0)
    highest = tl.max(tl.where(live, rows, -1), axis=0)
    end = tl.where(highest < 0, 0, end)
    if CAUSAL:
        end = tl.minimum(end, highest + offset + 1)
    if WINDOWED:
        start = tl.maximum(start, lowest + offset - window + 1)
        end = tl.minimum(end, highest + offset + window)
    if MASKED:
        begins = tl.load(first + rows * bound_row, mask=live, other=2147483647)
        ends = tl.load(last + rows * bound_row, mask=live, other=0)
        start = tl.maximum(start, tl.min(begins, axis=0))
        end = tl.minimum(end, tl.max(ends, axis=0))
    return tl.maximum(start, 0), tl.maximum(end, 0)
