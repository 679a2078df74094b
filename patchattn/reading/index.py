"""Indexes: what is known of each page of keys, which queries are compared with in place of every key.

Page p is the keys from `p * page` on, by their columns, so that a page stays what it is as a kv cache grows.
"""

import torch
import torch.nn.functional as F

from patchattn_kernels.rows import full_precision

from ..cache.state import Make, SequenceState
from ..core import ranks
from ..core.call import AttentionCall
from ..core.mask import Mask
from .selection import plain_own

_STEPS = 15  # between the least and the greatest number of four bits


def page_facts(
    call: AttentionCall,
    state: SequenceState | None,
    name: str,
    page: int,
    make: Make,
) -> torch.Tensor:
    """`(B, Hkv, P, ...)` what is known of the P = Tk // page complete pages, made once where a kv cache remembers it.

    In a static cache that of a page with slots that are not filled yet is any.

    Args:
        call: the call.
        state: what is remembered of its sequences.
        name: of these facts.
        page: keys of a page.
        make: of `(B, Hkv, p * page, D)`, keys of p whole pages, their facts `(B, Hkv, p, ...)`; it is also told where
            they are among the keys of the call, which `counted_keys` takes.
    """
    keys, facts = call.key, None
    if state is not None and state.grows:
        facts = state.blocks(name, page, keys, make)
    elif state is not None and state.in_slots:
        return state.blocks_in_slots(name, page, keys, make, first=call.mask.own, rows=call.query.shape[2])
    part = slice(0, keys.shape[2] // page * page)
    return make(keys[:, :, part], part) if facts is None else facts


def counted_keys(mask: Mask, page: int, part: slice | torch.Tensor) -> torch.Tensor | None:
    """`(B or 1, n)` bool: which of some keys count in their pages; None: all do.

    They are text, no padding and no slot that is not filled yet, and of the last text that their page has keys of:
    queries of the earlier ones are in that page themselves, or see nothing of it.

    Args:
        mask: of the call.
        page: keys of a page.
        part: of the keys that are meant, as `state.blocks` tells it.
    """
    if plain_own(mask) is not None:
        return None
    real, begins = mask.real_keys()[:, 0], ranks.starts(mask)
    if begins is None:
        return real[:, part]
    begins = F.pad(begins, (0, -begins.shape[1] % page)).unflatten(1, (-1, page))
    behind = begins.flip(-1).cumsum(dim=-1).flip(-1) - begins.long()
    return (real & (behind == 0).flatten(1)[:, : real.shape[1]])[:, part]


def ends_of_pages(keys: torch.Tensor, page: int, real: torch.Tensor | None = None) -> torch.Tensor:
    """`(B, Hkv, P, 2D)` the greatest and the least entries among each page's keys.

    Args:
        keys: `(B, Hkv, P * page, D)`.
        page: how many a page has.
        real: as `counted_keys` gives them. A page of none is below every other one for all queries.
    """
    pages = keys.unflatten(2, (-1, page))
    if real is None:
        least, greatest = pages.aminmax(dim=3)
    else:
        hidden, most = ~real.unflatten(1, (-1, page))[:, None, :, :, None], torch.finfo(keys.dtype).max
        least, greatest = (pages.masked_fill(hidden, most).amin(dim=3), pages.masked_fill(hidden, -most).amax(dim=3))
    return torch.cat([greatest, least], dim=-1)


def sums_of_pages(states: torch.Tensor, page: int) -> torch.Tensor:
    """`(B, Hkv, P, D)` the sum of each page's `(B, Hkv, P * page, D)`."""
    return full_precision(states).unflatten(2, (-1, page)).sum(dim=3)


def of_four_bits(keys: torch.Tensor) -> torch.Tensor:
    """`(B, Hkv, Tk, D)` keys as they are known by one of 16 even steps from each one's least to its greatest number."""
    keys = full_precision(keys)
    least, greatest = keys.aminmax(dim=-1, keepdim=True)
    step = (greatest - least) / _STEPS
    return least + ((keys - least) / torch.where(step > 0, step, 1.0)).round() * step
