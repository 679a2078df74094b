"""Block-sparse attention in plain torch: the keys that a block of queries reads are gathered, the others left alone.

This is the fast path on a CPU, and it runs wherever Triton's kernels do not. It asks the device how much is listed.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .block_lists import BlockLists, SinkAndRecent, key_order, mask_from_lists, ranks, sequence_order
from .dense_attention_cpu import flash
from .rows import AttentionRule, blocks, full_precision, weights_of
from .sink_and_recent_cpu import by_slices, in_slices

ROWS = 256  # queries that share their keys, where nothing else says


class Part(NamedTuple):
    """Some queries of some heads, and the keys that they need.

    Attributes:
        heads: `(h,)` query heads.
        groups: `(g,)` their kv heads, one for every h / g of them.
        rows: which queries.
        columns: `(B or 1, h or 1, K)` numbers of keys.
        seen: `(B or 1, h or 1, C, K)` bool: which of them each query sees.
    """

    heads: torch.Tensor
    groups: torch.Tensor
    rows: slice
    columns: torch.Tensor
    seen: torch.Tensor


def selected(
    keep: SinkAndRecent | BlockLists,
    rule: AttentionRule,
    rows: slice,
    shape: tuple[int, int],
    device: torch.device,
) -> torch.Tensor:
    """`(B or 1, H or 1, C, Tk)` bool: which keys are kept for a slice of queries; `shape` is (Tq, Tk) of all."""
    queries, keys = shape
    row = torch.arange(queries, device=device)[rows]
    if isinstance(keep, BlockLists):
        key = torch.arange(keys, device=device)
        blocks = mask_from_lists(keep, -(-keys // keep.block_k))
        return blocks[:, :, row // keep.block_q][..., key // keep.block_k]
    order, own = ranks(rule, queries, keys, device)
    return kept(keep.sinks, keep.recent, order, sequence_order(rule, order), own[:, row])


def kept(
    sinks: torch.Tensor, recent: torch.Tensor, order: torch.Tensor, place: torch.Tensor, own: torch.Tensor
) -> torch.Tensor:
    """`(B or 1, h, C, K)`: sinks and recent keys of queries.

    Args:
        sinks: `(h,)` how many.
        recent: `(h,)` how many.
        order: `(B or 1, h or 1, K)` ranks of keys.
        place: likewise, counted from the start of their sequence.
        own: `(B or 1, C)` ranks of the queries' own keys.
    """
    near = (own[:, None, :, None] - order[:, :, None]).abs() < recent[:, None, None]
    return near | (place[:, :, None] <= sinks[:, None, None])


def _parts(
    keep: SinkAndRecent | BlockLists, rule: AttentionRule, query: torch.Tensor, key: torch.Tensor
) -> Iterator[Part]:
    """Queries of a few heads at a time, with the keys that they need, if any."""
    shape = (query.shape[2], key.shape[2])
    if isinstance(keep, BlockLists):
        parts = _listed_parts(keep, rule, query.shape[:2], key.shape[1], shape, key.device)
    else:
        parts = _window_parts(keep, rule, query.shape[1], key.shape[1], shape, key.device)
    return (part for part in parts if part.columns.shape[-1] > 0)


def _window_parts(
    keep: SinkAndRecent, rule: AttentionRule, heads: int, groups: int, shape: tuple[int, int], device: torch.device
) -> Iterator[Part]:
    rows, keys = shape
    order = key_order(rule, rows, keys, device)
    place = sequence_order(rule, order)
    offset = keys - rows if rule.offset is None else rule.offset
    sizes: dict[tuple[int, int], list[int]] = {}
    for head, size in enumerate(zip(keep.sinks.tolist(), keep.recent.tolist(), strict=True)):
        sizes.setdefault(size, []).append(head)
    for (sinks, recent), alike in sizes.items():
        some = torch.tensor(alike, device=device)
        group = torch.arange(groups, device=device) if len(sizes) == 1 else some // (heads // groups)
        first = (place <= sinks).any(dim=0)  # of any sequence
        for start in range(0, rows, ROWS):
            part = slice(start, min(start + ROWS, rows))
            low, high = order[:, offset + start, None], order[:, offset + part.stop - 1, None]
            wanted = first | ((order > low - recent) & (order < high + recent)).any(dim=0)
            if rule.causal:
                wanted[offset + part.stop :] = False
            columns = wanted.nonzero().squeeze(-1)
            own = order[:, offset + start : offset + part.stop]
            seen = rule.visible(part, shape, device, columns)[:, None]
            of_columns = (order[:, None, columns], place[:, None, columns])
            seen = seen & kept(keep.sinks[some[:1]], keep.recent[some[:1]], *of_columns, own)
            yield Part(some, group, part, columns[None, None], seen)


def _listed_parts(
    keep: BlockLists,
    rule: AttentionRule,
    heads: tuple[int, ...],
    groups: int,
    shape: tuple[int, int],
    device: torch.device,
) -> Iterator[Part]:
    rows, keys = shape
    some = torch.arange(heads[1], device=device)
    shared = keep.indices.shape[1] == 1  # all heads read the same blocks
    group = torch.arange(groups, device=device) if shared else some // (heads[1] // groups)
    inside = torch.arange(keep.block_k, device=device)
    longest = keep.counts.amax(dim=(0, 1)).tolist()
    for number, start in enumerate(range(0, rows, keep.block_q)):
        width = longest[number]
        listed = torch.arange(width, device=device) < keep.counts[:, :, number, None]
        columns = keep.indices[:, :, number, :width, None].long() * keep.block_k + inside
        member = (listed[..., None] & (columns < keys)).flatten(2)
        columns = columns.flatten(2).clamp(max=keys - 1)
        for some_rows in blocks(min(keep.block_q, rows - start), heads[0] * heads[1] * columns.shape[-1]):
            part = slice(start + some_rows.start, start + some_rows.stop)
            visible = rule.visible(part, shape, device).mT  # (B or 1, Tk, C)
            batch = torch.arange(len(visible), device=device)[:, None, None]
            yield Part(some, group, part, columns, visible[batch, columns].mT & member[:, :, None])


def _taken(tensor: torch.Tensor, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
    """`(B, g, K, D)` the keys or values of a part, and where they lie in `(B * G * Tk)`: `(B * g * K,)`."""
    batch, groups, keys, dim = tensor.shape
    places = torch.arange(batch, device=tensor.device)[:, None, None] * groups + part.groups[None, :, None]
    places = places * keys + part.columns
    taken = tensor.view(batch * groups * keys, dim).index_select(0, places.flatten())
    return taken.view(*places.shape, dim), places.flatten()


def gathered(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keep: SinkAndRecent | BlockLists,
    rule: AttentionRule,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `(B, H, Tq, Dv)` in the dtype of the operands and log-sum-exp `(B, H, Tq)`, without a graph."""
    if isinstance(keep, SinkAndRecent) and in_slices(rule, key.device):
        return by_slices(query, key, value, keep, rule)
    batch, heads, rows, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    output = value.new_zeros(batch, rows, heads, value.shape[-1]).transpose(1, 2)
    lse = query.new_full((batch, heads, rows), float("-inf"), dtype=dtype)
    key, value = key.contiguous(), value.contiguous()
    for part in _parts(keep, rule, query, key):
        of = (slice(None), slice(None) if len(part.heads) == heads else part.heads, part.rows)  # slices do not copy
        attended, sums = _attended(query[of], _taken(key, part)[0], _taken(value, part)[0], part.seen, rule.scaling)
        output[of] = attended.to(output.dtype)
        lse[of] = sums
    return output, lse


def _attended(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention `(B, h, C, Dv)` of a part and its log-sum-exp `(B, h, C)`."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    if query.device.type == "cpu":
        hidden = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
        output, lse = flash(query, key, value, scaling, hidden=hidden)
        return output, lse.masked_fill(~seen.any(dim=-1), float("-inf"))
    query, key, value = full_precision(query), full_precision(key), full_precision(value)
    logits = _grouped(query * scaling, key.shape[1]) @ key.mT
    logits = logits.view(*query.shape[:3], -1).masked_fill(~seen, float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    product = _grouped(weights_of(logits, lse), key.shape[1]) @ value
    return product.view(*query.shape[:3], -1), lse


def _grouped(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """`(B, h, C, X)` as `(B, g, h / g * C, X)`: one product per kv head."""
    return tensor.reshape(tensor.shape[0], groups, -1, tensor.shape[-1])


def gathered_backward(
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
    """Gradients of query, key and value, from those of output and log-sum-exp."""
    dtype = query.dtype
    delta = (full_precision(gradient) * full_precision(output)).sum(dim=-1)  # a softmax takes it off its weights'
    if lse_gradient is not None:
        delta = delta - lse_gradient
    key, value = full_precision(key).contiguous(), full_precision(value).contiguous()
    query_gradient = key.new_zeros(query.shape)
    key_gradient, value_gradient = torch.zeros_like(key), torch.zeros_like(value)
    for part in _parts(keep, rule, query, key):
        (keys, places), (values, _) = _taken(key, part), _taken(value, part)
        groups, of = len(part.groups), (slice(None), part.heads, part.rows)
        some, outer = full_precision(query[of]) * rule.scaling, full_precision(gradient[of])
        shape, rows = some.shape[:3], _grouped(some, groups)
        logits = (rows @ keys.mT).view(*shape, -1).masked_fill_(~part.seen, float("-inf"))
        weights = weights_of(logits, lse[of])
        inner = (_grouped(outer, groups) @ values.mT).view(*shape, -1).sub_(delta[of][..., None]).mul_(weights)
        query_gradient[of] = (_grouped(inner, groups) @ keys).view(*shape, -1) * rule.scaling
        for total, product in (
            (key_gradient, _grouped(inner, groups).mT @ rows),
            (value_gradient, _grouped(weights, groups).mT @ _grouped(outer, groups)),
        ):
            total.view(-1, total.shape[-1]).index_add_(0, places, product.flatten(0, 2))
    return query_gradient.to(dtype), key_gradient.to(dtype), value_gradient.to(dtype)
