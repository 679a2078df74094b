"""Pages that are read whatever their scores: a query's own, the first ones and the last ones of its text."""

import torch
import torch.nn.functional as F

from ..core.mask import Mask
from .selection import plain_own


def visible_pages(mask: Mask, page: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which pages have a key that a query sees, and which is the query's own, that of the last such key.

    Returns:
        Twice bool `(B or 1, 1 or H, Tq, ceil(Tk / page))`. A query that sees nothing has no page of its own.
    """
    number = torch.arange(-(-mask.keys // page), device=mask.device)
    first = plain_own(mask)
    if first is not None:
        own = (torch.arange(mask.queries, device=mask.device) + first)[None, None, :, None] // page
        return number <= own, number == own
    seen = F.pad(mask.seen(), (0, len(number) * page - mask.keys)).unflatten(-1, (-1, page)).any(dim=-1)
    last = torch.where(seen, number, -1).amax(dim=-1, keepdim=True)
    return seen, number == last


def ends_of_text(visible: torch.Tensor, own: torch.Tensor, first: int, local: int) -> torch.Tensor:
    """bool, as `visible_pages` gives them: each query's first visible pages, and the last ones up to its own.

    Args:
        visible: which pages a query sees; pages of padding alone stand between none.
        own: which is its own.
        first: how many first pages.
        local: how many last ones, its own among them.
    """
    order = visible.cumsum(dim=-1, dtype=torch.int32)
    last = torch.where(own, order, 0).amax(dim=-1, keepdim=True)
    return visible & ((order <= first) | ((order > last - local) & (order <= last)))
