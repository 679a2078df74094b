"""What keys receive above a quantile of each row, as A-VL sums it over the text of a prompt."""

import torch

from ..core.call import AttentionCall
from ..core.keeping import of_query_heads
from ..softmax.rows import attend_rows

_ENTRIES = 2**24  # of weights that are computed at once, 64 MiB in float32


def above_quantile(
    call: AttentionCall, keys: torch.Tensor, *, first: int, share: float, counts_own: bool
) -> torch.Tensor:
    """`(B, H, Tk - first)` float32 at least: sums over rows of the weights of some keys.

    Each row whose own key is among them adds its weight of that key, and of each other one that it sees the weight
    above the quantile of these weights in that row.

    Args:
        call: of attention, on a cache that keeps what it was given behind what it had.
        keys: `(B, 1 or Hkv, Tk)` bool.
        first: no earlier one of the call's keys is among them.
        share: of the quantile, interpolated linearly.
        counts_own: whether the own weight is among those that the quantile is of.
    """
    batch, heads, rows, _ = call.query.shape
    start = max(0, first - (call.mask.keys - rows))  # of the rows with such a key
    size = max(1, _ENTRIES // (batch * heads * call.mask.keys))
    keys = of_query_heads(keys, heads)
    dtype = torch.promote_types(call.value.dtype, torch.float32)
    sums = call.query.new_zeros(batch, heads, call.mask.keys - first, dtype=dtype)
    for begin in range(start, rows, size):
        place = torch.arange(begin, min(begin + size, rows), device=call.query.device)
        part = call.replace(
            query=call.query[:, :, place], mask=call.mask.of_rows(place), context=call.context.of_rows(place)
        )
        weights = attend_rows(part, lambda logits, _: logits.softmax(-1))[1][..., first:].detach()
        own = place[:, None] + (call.mask.keys - rows) == torch.arange(first, call.mask.keys, device=place.device)
        seen = part.mask.seen()[..., first:] & keys[:, :, None, first:]
        counted = seen if counts_own else seen & ~own
        count = counted.sum(-1, keepdim=True)
        at = (count - 1).clamp(min=0) * share
        ordered = weights.masked_fill(~counted, torch.inf).sort(dim=-1).values
        low, high = (ordered.gather(-1, end.long().expand(*ordered.shape[:3], 1)) for end in (at.floor(), at.ceil()))
        quantile = torch.where(count > 0, low + (high - low) * (at - at.floor()).to(low.dtype), 0.0)
        gained = torch.where(own, weights, weights - quantile).where(seen, 0.0)
        of_text = keys[:, :, (call.mask.keys - rows) + place, None]
        sums = sums + gained.where(of_text, 0.0).to(dtype).sum(2)
    return sums
