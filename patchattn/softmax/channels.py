"""Terms added to logits as extra channels of queries and keys, so that every base implementation computes them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..core.call import AttentionCall
from ..core.variant import Attend, AttentionOutput


def parts(number: torch.Tensor, dtype: torch.dtype, most: int = 2) -> list[torch.Tensor]:
    """A tensor as a sum of tensors of a dtype: one where that holds its numbers, else the rounded one and what is left.

    The gradient passes through the first part alone, whose rounding is the identity to it.

    Args:
        number: it.
        dtype: of the parts.
        most: how many of them; two keep 16 bits in bfloat16, three all of float32.
    """
    found = [number.to(dtype)]
    if torch.finfo(dtype).bits >= torch.finfo(number.dtype).bits:
        return found
    left = number.detach()
    for _ in range(most - 1):
        left = left - found[-1].detach().to(number.dtype)
        found.append(left.to(dtype))
    return found


def attend_wider(
    call: AttentionCall, query: torch.Tensor, key: torch.Tensor, inner: Attend | Callable[..., AttentionOutput]
) -> AttentionOutput:
    """Attend with more channels, of which values get as many zeros, to a multiple of 8, as fused attention wants it.

    Args:
        call: of attention.
        query: `(B or 1, H or 1, Tq or 1, n)` further channels of queries.
        key: `(B or 1, Hkv or 1, Tk or 1, n)` further channels of keys. The sum of the products of both, times the
            scaling of the call, is added to the logits.
        inner: what computes.

    Returns:
        As of a call without them.
    """
    width, out = call.query.shape[-1], call.value.shape[-1]
    wide = -(-(width + query.shape[-1]) // 8) * 8
    value = F.pad(call.value, (0, wide - out)) if out == width else call.value
    output, weights = inner(
        call.replace(
            query=_joined(call.query, query, wide),
            key=_joined(call.key, key, wide),
            value=value,
            scaling=call.scaling,
        )
    )
    return output[..., :out], weights


def _joined(states: torch.Tensor, more: torch.Tensor, wide: int) -> torch.Tensor:
    more = F.pad(more.to(states.dtype), (0, wide - states.shape[-1] - more.shape[-1]))
    batch = max(len(states), len(more))
    return torch.cat([states.expand(batch, -1, -1, -1), more.expand(batch, *states.shape[1:3], -1)], dim=-1)
