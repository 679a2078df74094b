"""What queries see of their keys, and what a mask is narrowed by: keys, sinks and recent keys, or blocks of keys."""

import torch
import torch.nn.functional as F

from patchattn_kernels import BlockLists, SinkAndRecent
from patchattn_kernels.block_lists import check_counted, mask_from_lists
from patchattn_kernels.block_sparse_attention_cpu import kept
from patchattn_kernels.rows import seen_by

from . import ranks
from .columns import Columns, Keep


def checked(keep: object, mask: Columns) -> Keep:
    """It in the form that a mask keeps it in, tensors as `(B or 1, H or 1, Tq or 1, Tk)`.

    Raises:
        TypeError, ValueError: as `Mask.narrowed`.
    """
    if isinstance(keep, SinkAndRecent):
        if len(keep.sinks) not in (1, mask.heads):
            raise ValueError(
                f"Expected sinks and recent keys for all, or of {mask.heads} heads, got {len(keep.sinks)}."
            )
        return keep
    if isinstance(keep, BlockLists):
        shape = keep.indices.shape
        if shape[0] not in (1, mask.batch) or shape[1] not in (1, mask.heads):
            raise ValueError(f"Expected lists of {mask.batch} sequences and {mask.heads} heads, got {tuple(shape)}.")
        return keep
    if not isinstance(keep, torch.Tensor) or keep.dtype != torch.bool:
        kind = keep.dtype if isinstance(keep, torch.Tensor) else type(keep).__name__
        raise TypeError(f"A mask is narrowed by a bool tensor, SinkAndRecent, BlockLists or None, got {kind}.")
    whole = keep[:, :, None] if keep.dim() == 3 else keep
    fits = (
        whole.dim() == 4
        and whole.shape[0] in (1, mask.batch)
        and (mask.heads % whole.shape[1] == 0 if keep.dim() == 3 else whole.shape[1] in (1, mask.heads))
        and whole.shape[2] in (1, mask.queries)
        and whole.shape[3] == mask.keys
    )
    if not fits:
        raise ValueError(
            f"Expected a bool tensor (B, 1 or kv heads, {mask.keys}) or (B, 1 or H, {mask.queries} or 1, {mask.keys}) "
            f"for {mask.batch} sequences and {mask.heads} query heads, got {tuple(keep.shape)}."
        )
    return of_query_heads(whole, mask.heads)


def as_mask(keep: Keep, mask: Columns) -> torch.Tensor:
    """`(B or 1, H or 1, Tq or 1, Tk)` bool."""
    if isinstance(keep, torch.Tensor):
        return keep
    if isinstance(keep, BlockLists):
        blocks = mask_from_lists(keep, -(-mask.keys // keep.block_k))
        row, key = (torch.arange(size, device=blocks.device) for size in (mask.queries, mask.keys))
        return blocks[:, :, row // keep.block_q][..., key // keep.block_k]
    check_counted(keep, uncounted=mask.uncounted)
    order, place = (of_query_heads(each, mask.heads) for each in (ranks.key_order(mask), ranks.key_places(mask)))
    return kept(keep.sinks, keep.recent, order, place, ranks.row_order(mask))


def seen(mask: Columns) -> torch.Tensor:
    """As `Mask.seen`."""
    found = _before_keeps(mask)
    for keep in mask.keeps:
        found = found & as_mask(keep, mask)
    return found


def added(mask: Columns) -> torch.Tensor | None:
    """As `Mask.added`."""
    if not isinstance(mask.pairs, torch.Tensor) or not mask.pairs.is_floating_point():
        return None
    return ranks.behind_extra(mask, _at_keys(mask, mask.pairs))


def _before_keeps(mask: Columns) -> torch.Tensor:
    mask._check()
    if mask.pairs is not None:
        seen = _at_keys(mask, seen_by(mask._pairs()))
        if mask.index is not None and mask.has_empty:
            seen = seen & of_query_heads(mask.index >= 0, mask.heads)[:, :, None]
        return ranks.behind_extra(mask, seen, value=True)
    seen = ranks.real_keys(mask)[:, :, None].expand(-1, -1, mask.queries, -1)
    if mask.causal or mask.sequence is not None:
        size = mask.columns - mask.dropped
        key = torch.arange(size, device=mask.device)[None, None] if mask.index is None else mask._places(mask.index)
        own = ranks.own(mask)
        if mask.causal:
            seen = seen & (key[:, :, None] <= own[:, None, :, None])
        if mask.sequence is not None:
            seen = seen & (mask.sequence[own][:, None, :, None] == mask.sequence[key][:, :, None])
    if mask.window is not None:
        away = ranks.row_order(mask)[:, None, :, None] - ranks.key_order(mask)[:, :, None, mask.extra :]
        seen = seen & (away.abs() < mask.window)
    return ranks.behind_extra(mask, of_query_heads(seen, mask.heads), value=True)


def _at_keys(mask: Columns, pairs: torch.Tensor) -> torch.Tensor:
    """What is said by column `(B or 1, H or 1, Tq, columns)` by key, without the extra ones."""
    if mask.index is None:
        return pairs
    places = mask._places(mask.index)
    if places.shape[1] > 1:
        places = of_query_heads(places, mask.heads)
    batch, heads = (max(one, other) for one, other in zip(pairs.shape[:2], places.shape[:2], strict=True))
    places = places[:, :, None].expand(batch, heads, pairs.shape[2], -1)
    return pairs.expand(batch, heads, -1, -1).gather(-1, places)


def gathered(keep: Keep, index: torch.Tensor, mask: Columns) -> Keep:
    """Of some keys; ranks stay what they are."""
    if isinstance(keep, SinkAndRecent):
        return keep
    whole = as_mask(keep, mask)
    if index.shape[1] > 1:
        index = of_query_heads(index, mask.heads)
    batch, heads = (max(one, other) for one, other in zip(whole.shape[:2], index.shape[:2], strict=True))
    index = index.clamp(min=0)[:, :, None].expand(batch, heads, whole.shape[2], -1)
    return whole.expand(batch, heads, -1, -1).gather(-1, index)


def of_rows(keep: Keep, rows: torch.Tensor, mask: Columns) -> Keep:
    """Of some queries, `(B or 1, R)`."""
    if isinstance(keep, SinkAndRecent):
        return keep
    whole = as_mask(keep, mask)
    return whole if whole.shape[2] == 1 and mask.queries > 1 else rows_of(whole, rows)


def rows_of(pairs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`(B or 1, H or 1, R, K)` of pairs `(B or 1, H or 1, Tq, K)`."""
    if len(rows) == 1:
        return pairs.index_select(2, rows[0])
    place = rows[:, None, :, None].expand(-1, pairs.shape[1], -1, pairs.shape[3])
    return pairs.expand(len(rows), -1, -1, -1).gather(2, place)


def of_heads(keep: Keep, heads: torch.Tensor, mask: Columns) -> Keep:
    """Of some query heads."""
    if isinstance(keep, SinkAndRecent):
        if len(keep.sinks) == 1:
            return keep
        return SinkAndRecent(keep.sinks[heads], keep.recent[heads], keep.most_sinks, keep.window)
    if isinstance(keep, BlockLists):
        if keep.indices.shape[1] == 1:
            return keep
        return BlockLists(keep.indices[:, heads], keep.counts[:, heads], keep.block_q, keep.block_k)
    return keep if keep.shape[1] == 1 else keep.index_select(1, heads)


def prepended(keep: Keep, count: int, mask: Columns) -> Keep:
    """With keys in front, all of which stay."""
    return keep if isinstance(keep, SinkAndRecent) else F.pad(as_mask(keep, mask), (count, 0), value=True)


def of_query_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """`(B, 1 or H, ...)` of what is said by kv head `(B, 1 or Hkv or H, ...)`."""
    groups = tensor.shape[1]
    return tensor if groups in (1, heads) else tensor.repeat_interleave(heads // groups, dim=1)
