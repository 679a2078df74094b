"""Scores of keys by what is in their values, whatever the query: learned by being added to the logits."""

import torch
import torch.nn.functional as F

from patchattn_kernels.rows import full_precision

from ..core.call import AttentionCall


def value_scores(call: AttentionCall, weight: torch.Tensor, scale: torch.Tensor, *, by: str) -> torch.Tensor:
    """`(B, Hkv, Tq)` scores `a softplus(w v)` of the tokens of a call, for `Variant.key_facts`.

    Args:
        call: the call.
        weight: `(Hkv, Hkv * D)` w of every kv head; v are the values of a token in all kv heads.
        scale: `(Hkv,)` a.
        by: who scores, for the message.

    Raises:
        NotImplementedError: values are of another width.
    """
    own = call.context.own_key()
    rows = torch.arange(call.query.shape[2], device=call.value.device) + (0 if own is None else own)
    values = call.value.index_select(2, rows).transpose(1, 2).flatten(2)
    if values.shape[2] != weight.shape[1]:
        raise NotImplementedError(
            f"{by} was made for values of {weight.shape[1]} channels in all kv heads together, and those of "
            f"{call.site.name} have {values.shape[2]}: leave it out with modules=... or layers=..."
        )
    return (F.softplus(F.linear(full_precision(values), full_precision(weight))) * full_precision(scale)).transpose(
        1, 2
    )
