"""Parts of the kernels of `split_attention` and `column_mass`. Imports triton: import it where kernels are launched.

Some go from queries to keys, others from keys to queries: what is written here for `rows` and `columns` takes them as
`(M, 1)` and `(1, N)`, or as `(1, M)` and `(N, 1)`.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)  # kernels count in powers of two
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def seen(
    rows,
    columns,
    queries,
    keys,
    mask,
    mask_row,
    mask_column,
    offset,
    window,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    MASKED: tl.constexpr,
    PER_ROW: tl.constexpr,
):
    """Which of some keys some queries see; `mask` points to the batch's rows, and has one for all but `PER_ROW`."""
    inside = (rows < queries) & (columns < keys)
    if CAUSAL:
        inside = inside & (columns <= rows + offset)
    if WINDOWED:
        distance = rows + offset - columns
        inside = inside & (distance < window) & (distance > -window)
    if MASKED:
        if PER_ROW:
            place = rows.to(tl.int64) * mask_row + columns.to(tl.int64) * mask_column
            inside = inside & (tl.load(mask + place, mask=inside, other=0) != 0)
        else:
            place = columns.to(tl.int64) * mask_column
            inside = inside & (tl.load(mask + place, mask=columns < keys, other=0) != 0)
    return inside


@triton.jit
def full_keys(
    lowest,
    highest,
    start,
    end,
    keys,
    offset,
    window,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Between which keys of a range all of the queries from `lowest` to `highest` see all; in whole tiles."""
    begins = start
    ends = tl.minimum(end, keys // BLOCK_N * BLOCK_N)
    if CAUSAL:
        ends = tl.minimum(ends, tl.maximum(lowest + offset + 1, 0) // BLOCK_N * BLOCK_N)
    if WINDOWED:
        begins = tl.maximum(begins, tl.cdiv(tl.maximum(highest + offset - window + 1, 0), BLOCK_N) * BLOCK_N)
        ends = tl.minimum(ends, tl.maximum(lowest + offset + window, 0) // BLOCK_N * BLOCK_N)
    if MASKED:
        ends = begins
    begins = tl.minimum(begins, end)
    return begins, tl.maximum(begins, ends)


@triton.jit
def query_range(
    low,
    high,
    queries,
    first,
    last,
    bound_row,
    offset,
    window,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """From which query on, and up to which one, any sees a key from `low` to `high`; empty if none does."""
    start = 0
    end = queries
    if CAUSAL:
        start = tl.maximum(start, low - offset)
    if WINDOWED:
        start = tl.maximum(start, low - window + 1 - offset)
        end = tl.minimum(end, high + window - offset)
    if MASKED:
        nearest = end
        farthest = start
        for chunk in range(start, end, 1024):
            rows = chunk + tl.arange(0, 1024)
            begins = tl.load(first + rows * bound_row, mask=rows < end, other=2147483647)
            ends = tl.load(last + rows * bound_row, mask=rows < end, other=0)
            sees = (begins <= high) & (ends > low)
            nearest = tl.minimum(nearest, tl.min(tl.where(sees, rows, 2147483647), axis=0))
            farthest = tl.maximum(farthest, tl.max(tl.where(sees, rows + 1, 0), axis=0))
        start = nearest
        end = farthest
    return start, tl.maximum(start, end)


@triton.jit
def full_queries(
    low,
    high,
    start,
    end,
    keys,
    queries,
    offset,
    window,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Between which queries of a range, in whole tiles from its start, all see all keys from `low` to `high`."""
    begins = start
    ends = end
    if CAUSAL:
        begins = tl.maximum(begins, high - offset)
    if WINDOWED:
        begins = tl.maximum(begins, high - window + 1 - offset)
        ends = tl.minimum(ends, low + window - offset)
    begins = tl.minimum(start + tl.cdiv(begins - start, BLOCK_M) * BLOCK_M, end)
    ends = begins + tl.maximum(ends - begins, 0) // BLOCK_M * BLOCK_M
    if MASKED:
        ends = begins
    ends = tl.where(high < keys, ends, begins)
    return begins, ends


@triton.jit
def load_rows(base, rows, count, stride, DIM: tl.constexpr, BLOCK_D: tl.constexpr, FULL: tl.constexpr):
    """(rows, BLOCK_D) vectors of queries, keys or values, zeros beyond their number; `FULL`: all rows are there."""
    dims = tl.arange(0, BLOCK_D)[None, :]
    places = base + rows.to(tl.int64)[:, None] * stride + dims
    if FULL:
        tile = tl.load(places) if DIM == BLOCK_D else tl.load(places, mask=dims < DIM, other=0.0)
    else:
        inside = (rows < count)[:, None]
        if DIM != BLOCK_D:
            inside = inside & (dims < DIM)
        tile = tl.load(places, mask=inside, other=0.0)
    return tile


@triton.jit
def store_rows(base, rows, count, stride, tile, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write what `load_rows` reads, in the dtype of the pointer."""
    dims = tl.arange(0, BLOCK_D)[None, :]
    places = base + rows.to(tl.int64)[:, None] * stride + dims
    tl.store(places, tile.to(base.dtype.element_ty), mask=(rows < count)[:, None] & (dims < DIM))


@triton.jit
def load_lse(lse, rows, queries):
    """Log-sum-exp of some rows, base 2; inf where a row is not there or sees nothing, so that its weights are zeros."""
    natural = tl.load(lse + rows, mask=rows < queries, other=float("inf"))
    return tl.where(natural == float("-inf"), float("inf"), natural * LOG2_E)
