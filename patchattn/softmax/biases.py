"""Biases of keys: numbers added to the logits of a key, whoever looks at it."""

from typing import final

import torch
import torch.nn.functional as F

from ..core.call import AttentionCall
from ..core.variant import Attend, AttentionOutput, Variant
from .channels import attend_wider, parts
from .rows import attend_half_row, attend_rows, attend_with_lse, reads_keys_once

_STEP = 64.0  # of queries: keys hold that much less, so that float16 has room


class KeyBiasVariant(Variant):
    """A variant that adds a number to the logit of each key, by query head.

    It is made by extra channels, of which every query head has its own, so that every base implementation computes it,
    without an `(N, N)` mask. Decoding in float32, or in half precision on a CPU, adds it to the logits of its one row,
    so that keys are not copied.
    Register it as `innermost`: what came after would take the channels for those of the model; without `softcap`,
    which would bend it; and without `sinks` where what all keys have in common is left out.

    A bias of zeros is the model but for rounding: how a processor orders sums depends on the number of channels.
    """

    neutral_rounds = True

    def key_bias(self, call: AttentionCall) -> torch.Tensor:
        """`(B or 1, H, Tk)` float32 or wider; it is not scaled. What all keys share moves sinks alone."""
        raise NotImplementedError(f"{type(self).__name__} must define key_bias(call).")

    @final
    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        return attend_biased(call, self.key_bias(call), inner)


def attend_biased(call: AttentionCall, bias: torch.Tensor, inner: Attend) -> AttentionOutput:
    """Attention with a number added to the logit of each key, as `KeyBiasVariant` says.

    Args:
        call: of attention.
        bias: `(B or 1, H or 1, Tk)`, not scaled.
        inner: the base implementation.
    """
    heads, groups = call.query.shape[1], call.key.shape[1]
    bias = bias if bias.shape[1] == heads else bias.expand(-1, heads, -1)
    row = attend_with_lse(call, bias) or attend_half_row(call, bias)
    if row is not None:
        return row[0], None
    if reads_keys_once(call):
        output, _ = attend_rows(call, lambda logits, _: (logits + bias[:, :, None]).softmax(-1))
        return output, None
    bias = bias / (_STEP * call.scaling)
    of_group = bias.unflatten(1, (groups, heads // groups)).transpose(2, 3)  # (B, Hkv, Tk, H / Hkv)
    pieces = parts(of_group, call.key.dtype, most=3)
    own = torch.eye(heads // groups, dtype=call.query.dtype, device=call.query.device) * _STEP
    of_query = own.repeat(groups, len(pieces))[None, :, None]
    return attend_wider(call, of_query, torch.cat(pieces, dim=-1), inner)


def running_sum(past: torch.Tensor, new: torch.Tensor, first: int | torch.Tensor) -> torch.Tensor:
    """Sums over all keys so far `(B, h, Tk)`, of those of earlier keys and what new ones add.

    Args:
        past: `(B, h, Tk)` of earlier keys; anything from the first new key on.
        new: `(B, h, Tq)` what each new key adds.
        first: number of the first new key among all; in a tensor where slots are filled that no host counts.
    """
    count = new.shape[-1]
    if isinstance(first, int) and first + count == past.shape[-1]:
        total = new if count == 1 else new.cumsum(-1)
        if not first:
            return total
        earlier = past.narrow(-1, 0, first)
        return torch.cat([earlier, earlier.narrow(-1, first - 1, 1) + total], dim=-1)
    first = torch.as_tensor(first, device=past.device)
    before = F.pad(past, (1, 0)).index_select(-1, first.reshape(1))  # 0 in front of the first key
    where = first + torch.arange(count, device=new.device)
    return past.index_copy(-1, where, before + new.cumsum(-1))
