"""Where queries and keys are in their texts, padding left out."""

from typing import NamedTuple

import torch

from ..core.keeping import of_query_heads
from ..core.mask import Mask


class Ranks(NamedTuple):
    """Ranks among the real keys there ever were, which broadcast to `(B, H, Tq, Tk)`; the first is 1.

    Attributes:
        own: `(B or 1, 1, Tq, 1)` of queries' own keys.
        key: `(B or 1, 1 or H, 1, Tk)` of keys.
        start: `(B or 1, 1 or H, Tq, 1)` of the first key of each query's text.
    """

    own: torch.Tensor
    key: torch.Tensor
    start: torch.Tensor


def ranks(mask: Mask) -> Ranks:
    """The ranks of a call's queries and keys.

    A dense mask may hold several texts in a row: a text starts at the first key that its queries see. Queries whose
    window hides it take it from those before them.

    Raises:
        NotImplementedError: it is not known which keys are the queries' own.
    """
    own, key = mask.row_order()[:, None, :, None], of_query_heads(mask.key_order(), mask.heads)[:, :, None]
    if not isinstance(mask.pairs, torch.Tensor) or mask.index is not None:
        return Ranks(own, key, torch.ones_like(own))
    seen = mask.seen()
    shape = (max(len(seen), len(key)), *seen.shape[1:3], -1)
    start = key.expand(shape).gather(-1, seen.to(torch.uint8).argmax(dim=-1, keepdim=True).expand(shape))
    if mask.window is not None:
        start = torch.where(own - start < mask.window - 1, start, 1).cummax(dim=2).values
    return Ranks(own, key, start)
