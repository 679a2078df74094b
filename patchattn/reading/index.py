"""Indexes: what is known of each page of keys, which queries are compared with in place of every key.

Page p is the keys from `p * page` on, by their columns, so that a page stays what it is as a kv cache grows.
"""

from collections.abc import Callable

import torch

from patchattn_kernels.rows import full_precision

from ..cache.state import SequenceState
from ..core.call import AttentionCall

_STEPS = 15  # between the least and the greatest number of four bits


def page_facts(
    call: AttentionCall,
    state: SequenceState | None,
    name: str,
    page: int,
    make: Callable[[torch.Tensor], torch.Tensor],
    *,
    by_keys: bool = True,
) -> torch.Tensor:
    """`(B, Hkv, P, ...)` what is known of the P = Tk // page complete pages, made once where a kv cache remembers it.

    In a static cache that of a page with slots that are not filled yet is any.

    Args:
        call: the call.
        state: what is remembered of its sequences.
        name: of these facts.
        page: keys of a page.
        make: of `(B, Hkv, p * page, D)`, the keys of the last p whole pages, their facts `(B, Hkv, p, ...)`.
        by_keys: whether keys alone say them, wherever the pages are; a static cache has others made anew in every call.
    """
    keys, facts = call.key, None
    if state is not None and state.grows:
        facts = state.blocks(name, page, keys, make)
    elif state is not None and state.in_slots and by_keys:
        return state.blocks_in_slots(name, page, keys, make, first=call.mask.own, rows=call.query.shape[2])
    return make(keys[:, :, : keys.shape[2] // page * page]) if facts is None else facts


def ends_of_pages(keys: torch.Tensor, page: int) -> torch.Tensor:
    """`(B, Hkv, P, 2D)` the greatest and the least entries among each page's keys, of keys `(B, Hkv, P * page, D)`."""
    batch, groups, _, dim = keys.shape
    least, greatest = keys.view(batch, groups, -1, page, dim).aminmax(dim=3)
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
