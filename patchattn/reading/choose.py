"""Choices by scores: the highest, as many as hold a share, or down a tree. Of equal ones the first are chosen."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..cache import waiting


def highest(scores: torch.Tensor, visible: torch.Tensor, forced: torch.Tensor, count: int) -> torch.Tensor:
    """bool, as scores `(B, h, Tq, P)`: the forced ones and the best visible ones, `count` in all.

    Args:
        scores: the higher the better.
        visible: bool, broadcast to them: no other one is chosen.
        forced: likewise: those that are chosen first, no more than `count`.
        count: how many.
    """
    scores = scores.masked_fill(~visible, float("-inf")).masked_fill(forced & visible, float("inf"))
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True) & visible


def highest_and_last(scores: torch.Tensor, last: int, count: int) -> torch.Tensor:
    """Numbers `(..., count)`, ascending, of the last one and the best of those before it, of which all are visible.

    Args:
        scores: `(..., n)`, n at least `last`: only those before the last one are looked at.
        last: its number.
        count: how many, no more than `last + 1`.
    """
    scores, fits = scores[..., :last], 1 < count <= last
    if fits and not waiting.waits(scores) and not torch.compiler.is_compiling():
        values, best = scores.topk(count, dim=-1)  # takes a third of the time, and does not say which of equal ones
        if all(worst > next_one for worst, next_one in values[..., -2:].reshape(-1, 2).tolist()):
            best[..., -1] = last
            return best.sort(dim=-1).values
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : count - 1].sort(dim=-1).values
    return F.pad(best, (0, 1), value=last)


def holding_share(weights: torch.Tensor, share: float) -> torch.Tensor:
    """bool, as `(..., N)`: the largest weights, as few as sum up to a share of all, and those that equal the last."""
    ordered = weights.sort(dim=-1, descending=True).values
    before = ordered.cumsum(dim=-1) - ordered
    count = (before < share * ordered.sum(dim=-1, keepdim=True)).sum(dim=-1, keepdim=True).clamp(min=1)
    return (weights >= ordered.gather(-1, count - 1)) & (weights > 0)


def down_a_tree(
    first: torch.Tensor, end: torch.Tensor, pages: int, count: int, score: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The pages of each query that are left of those from `first` to `end`: bool `(B, h, Tq, P)`, `count` at most.

    They are cut into as many parts as even as can be. Each part of several pages is halved, the first half being the
    longer one, and of all those the `count` stay whose middle page scores highest, of equal ones the first, until no
    part is longer than one page.

    Args:
        first: `(B, h, Tq)` the first page.
        end: likewise, behind the last one.
        pages: P.
        count: how many.
        score: of pages `(B, h, Tq, n)` their scores.
    """
    part = torch.arange(count + 1, device=first.device)
    borders = first[..., None] + torch.div((end - first).clamp(min=0)[..., None] * part, count, rounding_mode="floor")
    start, stop = borders[..., :-1], borders[..., 1:]
    for _ in range((-(-pages // count) - 1).bit_length()):
        middle = (start + stop + 1) // 2
        starts = torch.stack([start, middle], dim=-1).flatten(-2)
        stops = torch.stack([middle, stop], dim=-1).flatten(-2)
        scores = score(((starts + stops) // 2).clamp(max=pages - 1)).masked_fill(starts >= stops, float("-inf"))
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(dim=-1).values
        start, stop = starts.gather(-1, best), stops.gather(-1, best)
    found = torch.zeros(*start.shape[:-1], pages + 1, dtype=torch.bool, device=start.device)
    return found.scatter(-1, torch.where(start < stop, start, pages), True)[..., :pages]


def chosen_first(chosen: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers `(..., most)` of those that are chosen among `(..., N)`, then of others, and how many are chosen `(...)`.

    Args:
        chosen: bool.
        most: that no more are chosen.
    """
    order = chosen.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices
    return order[..., :most], chosen.sum(dim=-1)
