"""The query heads of a kv head: one choice for all of them, or one each."""

from typing import Any, Literal

import torch
import torch.nn.functional as F

from ..core.call import AttentionCall
from ..core.keeping import of_query_heads
from ..core.places import Places
from ..core.settings import option
from .choose import chosen_first


def heads_option(default: Literal["kv", "query"], *, source: str) -> Any:
    """The setting that says what is chosen for."""
    return option(
        default,
        help="What is chosen for: every kv head, whatever any of its query heads wants most, or every query head.",
        source=source,
        choices=("kv", "query"),
    )


def reduced(scores: torch.Tensor, groups: int, how: Literal["max", "sum", "mean"]) -> torch.Tensor:
    """`(B, Hkv, ...)` of the scores of all query heads of each kv head, `(B, H, ...)`."""
    of_groups = scores.unflatten(1, (groups, -1))
    if how == "max":
        return of_groups.amax(dim=2)
    return of_groups.sum(dim=2) if how == "sum" else of_groups.mean(dim=2)


def any_of_group(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """`(B, 1 or Hkv, ...)` whether it is so in any query head of a kv head, of bool `(B, 1 or H, ...)`."""
    return tensor if tensor.shape[1] == 1 else tensor.unflatten(1, (groups, -1)).any(dim=2)


def attended_by_groups(call: AttentionCall) -> torch.Tensor | None:
    """Attention `(B, 1, H, D)` of the only query, the query heads of each kv head as rows of one product; or `None`.

    On a CPU that takes less time than heads one by one, which all read the keys. It is left to the base implementation
    where that does more than a softmax under a mask, and where the call is of all heads and keys that the model has:
    there a variant that drops nothing is the base bit for bit.
    """
    batch, heads, queries, dim = call.query.shape
    groups, every = call.key.shape[1], call.site.query_heads
    is_part = call.mask.index is not None or (every is not None and heads < every)
    is_plain = all(call.kwargs.get(name) is None for name in ("softcap", "s_aux", "position_bias"))
    if call.query.device.type != "cpu" or queries > 1 or heads == groups or not (is_part and is_plain):
        return None
    mask = call.mask.rendered()[0] if call.stands_alone else "unknown"
    if isinstance(mask, torch.Tensor) and mask.dim() == 4:
        mask = mask if mask.shape[1] == 1 else mask.reshape(len(mask), groups, -1, mask.shape[-1])
    elif mask is not None:
        return None
    query = call.query.reshape(batch, groups, -1, dim)
    output = F.scaled_dot_product_attention(query, call.key, call.value, attn_mask=mask, scale=call.scaling)
    return output.reshape(batch, 1, heads, -1)


def read_by_one(call: AttentionCall, kept: torch.Tensor, *, most: int, block: int = 1) -> Places:
    """What the only query of a call reads, of bool `(B, h, N)`: which keys, or pages of `block` keys, are kept.

    Where each query head chose for itself, the places are those of any head of its kv head, which are read together,
    with a mask by head beside them.

    Args:
        call: the call.
        kept: h is 1, Hkv or H.
        most: that no more are kept in a head.
        block: keys of a page.
    """
    groups, heads, keys = call.key.shape[1], call.query.shape[1], call.key.shape[2]
    if kept.shape[1] in (1, groups):
        return Places(*chosen_first(kept, most), block=block)
    of_heads = of_query_heads(kept, heads).repeat_interleave(block, dim=-1)[..., :keys]
    index, counts = chosen_first(any_of_group(kept, groups), min(most * (heads // groups), kept.shape[-1]))
    return Places(index, counts, block=block, of_heads=of_heads)
