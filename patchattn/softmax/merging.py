"""Several calls under one softmax: for queries, or keys, that stand at other positions to some keys than to others."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from patchattn_kernels import attention_with_lse
from patchattn_kernels.merging import shares_of
from patchattn_kernels.rows import full_precision, log_sum_exp, row_logits, weights_of

from ..core.call import AttentionCall
from ..core.host import host
from ..core.variant import AttentionOutput


def merged(*calls: AttentionCall, factors: Sequence[float] | None = None) -> AttentionOutput:
    """Attention whose rows are one softmax over all that several calls see.

    Each is computed alone, with the log-sum-exp of its rows, by which the outputs are then weighted. Weights are made
    only where they are asked for or dropped out: those of a key in all calls together. A variant that returns this is
    registered as `innermost`.

    Args:
        calls: of the same queries, as many keys and the same values, which differ in queries, keys and masks; of the
            logits of learned sinks those of the first count.
        factors: of each call's log-sum-exp before they are put together, above 0. Where one is not 1, the calls' shares
            are those of another softmax; by default all are.

    Returns:
        As `Variant.attend`.
    """
    first, *others = calls
    calls = (first, *(other.replace(kwargs={**other.kwargs, "s_aux": None}) for other in others))
    rate = (first.kwargs.get("dropout") or 0.0) if first.module.training else 0.0
    if rate or first.kwargs.get("output_attentions") or not host().computes_softmax(first.base):
        return _with_weights(calls, factors, rate)
    found = [attention_with_lse(call.query, call.key, call.value, call.rule()) for call in calls]
    shares = _shares([lse for _, lse in found], factors)
    output = sum(share[..., None] * part for share, (part, _) in zip(shares, found, strict=True))
    return torch.as_tensor(output).transpose(1, 2).to(first.value.dtype), None


def _shares(sums: Sequence[torch.Tensor], factors: Sequence[float] | None) -> list[torch.Tensor]:
    """Of each row, the share of each call, by the log-sum-exps; 0 where the row sees nothing."""
    if factors is not None:
        sums = [factor * lse for factor, lse in zip(factors, sums, strict=True)]
    return shares_of(sums)[0]


def _with_weights(calls: tuple[AttentionCall, ...], factors: Sequence[float] | None, rate: float) -> AttentionOutput:
    rules = [call.rule() for call in calls]
    logits = [
        row_logits(full_precision(call.query), full_precision(call.key), rule, slice(None))
        for call, rule in zip(calls, rules, strict=True)
    ]
    sums = [log_sum_exp(part, rule) for part, rule in zip(logits, rules, strict=True)]
    shares = _shares(sums, factors)
    value = calls[0].value
    parts = [weights_of(part, lse) * share[..., None] for part, lse, share in zip(logits, sums, shares, strict=True)]
    weights = torch.stack(parts).sum(0).to(value.dtype)
    dropped = F.dropout(weights, rate) if rate else weights
    output = (dropped.unflatten(1, (value.shape[1], -1)) @ value[:, :, None]).flatten(1, 2)
    return output.transpose(1, 2), weights
