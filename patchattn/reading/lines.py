"""What the last queries of a text attend to, summed over columns and along diagonals.

A diagonal is the pairs of a query and a key at one distance. It is told by the key at that distance from its text's
last token, so that what is said of diagonals has a place for each key, and texts that are packed in one row stay apart.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from patchattn_kernels.rows import blocks, full_precision, row_logits

from ..core.call import AttentionCall
from ..core.mask import Mask
from .selection import plain_own


class Texts(NamedTuple):
    """Where the texts of a call's rows lie.

    Attributes:
        of_keys: `(B or 1, Tk)` number of real keys in front of each key's text, which tells texts apart.
        of_rows: `(B or 1, Tq)` the same of each query's text.
        behind_keys: `(B or 1, Tk)` number of real keys behind each key in its text.
        behind_rows: `(B or 1, Tq)` the same of each query's own.
    """

    of_keys: torch.Tensor
    of_rows: torch.Tensor
    behind_keys: torch.Tensor
    behind_rows: torch.Tensor


class Lines(NamedTuple):
    """Sums `(B, H, Tk)` of weights: received by each key, and along the diagonal that each key stands for."""

    columns: torch.Tensor
    diagonals: torch.Tensor


def texts_of(mask: Mask) -> Texts:
    """Of a call whose keys are all that there ever were.

    Raises:
        NotImplementedError: nothing says which key is a query's own.
    """
    row, key = mask.row_order(), mask.key_order()[:, 0]
    of_rows, of_keys = row - mask.row_places(), key - mask.key_places()[:, 0]
    batch = max(len(row), len(key))
    row, of_rows, key, of_keys = (part.expand(batch, -1) for part in (row, of_rows, key, of_keys))
    ends = row.new_zeros(batch, mask.columns + 1).scatter_reduce(1, of_rows, row, "amax")
    return Texts(of_keys, of_rows, ends.gather(1, of_keys) - key, ends.gather(1, of_rows) - row)


def lines_of(call: AttentionCall, texts: Texts, last: int) -> Lines:
    """Attention weights of the last queries of each text, summed up.

    Args:
        call: the call.
        texts: of its rows.
        last: how many queries of each text count.
    """
    query, key, rule = full_precision(call.query), full_precision(call.key), call.rule()
    batch, heads, rows, _ = query.shape
    keys, real = key.shape[2], call.mask.real()
    order, by_rank = call.mask.key_order()[:, 0], keys_by_rank(call.mask)
    parts = [slice(max(0, rows - last), rows)]
    if plain_own(call.mask) is None:  # the last queries are anywhere
        parts = list(blocks(rows, batch * heads * keys))
    sums = [query.new_zeros(batch, heads, keys) for _ in range(2)]
    for part in parts:
        behind = texts.behind_rows[:, part]
        weights = row_logits(query, key, rule, part).softmax(dim=-1).nan_to_num(0.0)
        counts = (behind < last) & real[:, part]
        weights = weights.masked_fill(~counts[:, None, :, None], 0.0)
        # the weight at a key of a query with n tokens behind it counts at the n-th key behind that one
        rank = order[:, None] - behind[..., None]
        source = by_rank.expand(len(rank), -1).gather(-1, rank.clamp(min=0).flatten(1)).view_as(rank)
        shifted = weights.gather(-1, source[:, None].expand_as(weights))
        sums[0] = sums[0] + weights.sum(dim=2)
        sums[1] = sums[1] + shifted.masked_fill((rank < 1)[:, None], 0.0).sum(dim=2)
    return Lines(*(total.detach() for total in sums))


def keys_by_rank(mask: Mask) -> torch.Tensor:
    """`(B or 1, Tk + 1)` int: the key of each rank among the real ones of its row, from 1 on; any for other ranks.

    Padding may stand between keys of one text: prompts that were padded behind, and went on.
    """
    order = mask.key_order()[:, 0].masked_fill(~mask.real_keys()[:, 0], 0)
    number = torch.arange(mask.keys, device=mask.device).expand_as(order)
    return number.new_zeros(len(order), mask.keys + 1).scatter(-1, order, number)


class Ranks(NamedTuple):
    """Places of scores `(B, H, N)` in the order from the highest to the lowest of each one's group.

    Attributes:
        rank: how many come before it; of equal ones the first comes first.
        running: sum of those up to it, itself included.
    """

    rank: torch.Tensor
    running: torch.Tensor


def ranked(scores: torch.Tensor, groups: torch.Tensor) -> Ranks:
    """Scores `(B, H, N)` ranked within groups, told by numbers `(B or 1, N)`."""
    groups = groups[:, None].expand(scores.shape)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    by_group = groups.gather(-1, order).sort(dim=-1, stable=True)
    order = order.gather(-1, by_group.indices)
    start = torch.searchsorted(by_group.values, by_group.values)
    running = F.pad(scores.gather(-1, order).cumsum(dim=-1), (1, 0))
    place = torch.arange(scores.shape[-1], device=scores.device) - start
    return Ranks(
        torch.zeros_like(start).scatter(-1, order, place),
        torch.zeros_like(scores).scatter(-1, order, running[..., 1:] - running.gather(-1, start)),
    )


def no_more(running: torch.Tensor, most: torch.Tensor | float) -> torch.Tensor:
    """bool: which running sums are at most so large, or larger by roundings alone.

    Weights of whole rows sum up to a whole number: where all are about alike, a share of the rows is met exactly.
    """
    return running <= most + 64 * torch.finfo(running.dtype).eps * running


def along_diagonals(chosen: torch.Tensor, texts: Texts, mask: Mask, block: int) -> torch.Tensor:
    """bool `(B, H, Tq, Tk)`: which pairs lie on a chosen diagonal, for some query of the same block.

    Blocks of queries are counted from the start of each text.

    Args:
        chosen: bool `(B, H, Tk)`, by the key that stands for a diagonal.
        texts: of the rows.
        mask: of the call.
        block: queries of a block; 1 reads the diagonals alone.
    """
    batch, heads, keys = chosen.shape
    within = (mask.row_places() - 1).clamp(min=0) % block
    shift = texts.behind_rows + within
    order, start, by_rank = mask.key_order()[:, 0], texts.of_keys, keys_by_rank(mask)
    end = order + texts.behind_keys  # as ranks, like all that follows
    running = chosen.cumsum(dim=-1, dtype=torch.int32)
    running = running.gather(-1, by_rank[:, None].expand(batch, heads, -1)).index_fill(-1, by_rank.new_zeros(1), 0)
    running, parts = running[:, :, None], []
    for part in blocks(mask.queries, batch * heads * keys):
        place = order[:, None] + shift[:, part, None]
        until = torch.minimum(place, end[:, None])[:, None].expand(batch, heads, -1, -1)
        since = torch.minimum(torch.maximum(place - block, start[:, None]), end[:, None])
        since = since[:, None].expand(batch, heads, -1, -1)
        counts = running.expand(-1, -1, until.shape[2], -1)
        parts.append(counts.gather(-1, until) > counts.gather(-1, since))
    return torch.cat(parts, dim=2)
