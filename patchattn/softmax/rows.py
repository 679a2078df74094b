"""Rows: attention whose weights are another map of a row's logits, a few rows at a time."""

from collections.abc import Callable
from typing import final

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from patchattn_kernels.dense_attention_cpu import flash, in_one_call, runs_on

from ..core.call import AttentionCall
from ..core.host import host
from ..core.rendering import sees_all
from ..core.variant import Attend, AttentionOutput, Variant

HIDDEN = torch.finfo(torch.float32).min / 4  # the logit of a hidden key
_ENTRIES = 2**24  # of logits that are computed at once, 64 MiB in float32


class RowVariant(Variant):
    """A variant that computes attention weights itself, from the logits of whole rows.

    Logits of all rows are never stored at once: rows come in chunks, which backward computes again. Register it as
    `innermost`, and without `sinks`: its rows have no place for them.
    """

    def weights(self, logits: torch.Tensor, visible: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """Weights `(B, H, R, Tk)` of some rows.

        Args:
            logits: `(B, H, R, Tk)` float32 or wider, scaled, capped and with biases; of hidden keys finite and as low
                as can be.
            visible: `(B or 1, H or 1, R, Tk)` bool. What hidden keys are given does not matter.
            call: of these rows.
        """
        raise NotImplementedError(f"{type(self).__name__} must define weights(logits, visible, call).")

    @final
    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        count, size = call.query.shape[2], rows_at_once(call)

        def of(start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
            part = some_rows(call, start, end)
            return attend_rows(part, lambda logits, visible: self.weights(logits, visible, part))

        return in_chunks(call, count, size, of)


def rows_at_once(call: AttentionCall, copies: int = 1) -> int:
    """How many rows of logits fit into memory at once, which are held so many times."""
    heads, keys = call.query.shape[1], call.key.shape[2]
    return max(1, _ENTRIES // (copies * max(len(call.query), len(call.key)) * heads * keys))


def in_chunks(
    call: AttentionCall, count: int, size: int, of: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
) -> AttentionOutput:
    """What `of(start, end)`, output and weights of some rows, gives of `count` rows, `size` at once.

    Backward computes chunks again. Weights are kept only where the call asks for them.
    """
    asked = call.kwargs.get("output_attentions") or not host().computes_softmax(call.base)
    if size >= count:
        output, weights = of(0, count)
        return output, weights if asked else None
    parts: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for start in range(0, count, size):
        end = min(start + size, count)
        if torch.is_grad_enabled() and not asked:
            output = checkpoint(lambda start, end: of(start, end)[0], start, end, use_reentrant=False)
            parts.append((output, None))
        else:
            output, weights = of(start, end)
            parts.append((output, weights if asked else None))
    found = [weights for _, weights in parts if weights is not None]
    return torch.cat([output for output, _ in parts], dim=1), torch.cat(found, dim=2) if found else None


def attend_rows(
    call: AttentionCall, weigh: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `(B, R, H, D)` and weights `(B, H, R, Tk)` of a call, all logits of which are stored.

    Args:
        call: of attention.
        weigh: weights of logits `(B, H, R, Tk)` and of what is visible, as `RowVariant.weights`.
    """
    return weighted_values(call, row_weights(call, weigh))


def row_weights(call: AttentionCall, weigh: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Weights `(B, H, R, Tk)` of a call, of hidden keys 0; `weigh` as of `attend_rows`."""
    visible = call.mask.seen()
    return weigh(_logits(call, visible), visible) * visible


def weighted_values(call: AttentionCall, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `(B, R, H, D)` of weights `(B, H, R, Tk)`, with dropout, and these weights in the dtype of values."""
    weights = weights.to(call.value.dtype)
    rate = call.kwargs.get("dropout") or 0.0
    dropped = F.dropout(weights, rate, call.module.training) if rate else weights
    return of_groups(dropped, call.value).transpose(1, 2), weights


def reads_keys_once(call: AttentionCall) -> bool:
    """Whether a call is one row that `attend_rows` computes as well as the base implementation, without copying keys.

    So decoding needs no wider keys for a term of the logits. Of keys in half precision it would need a copy; see
    `attend_half_row`.
    """
    one_row = call.query.shape[2] == 1 and torch.finfo(call.key.dtype).bits >= 32
    return one_row and call.stands_alone and call.kwargs.get("s_aux") is None


def attend_with_lse(call: AttentionCall, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Output `(B, R, H, Dv)` of a call without a mask and its log-sum-exp `(B, H, R)`, by torch's kernel for CPUs.

    It is what sdpa computes there itself, and takes a number to add by key at no cost. `None` where it does not compute
    the call: elsewhere, with gradients, while compiling, under autocast.

    Args:
        call: of attention.
        bias: `(B or 1, H, Tk)`, added to the logits in float32 or wider.
    """
    query, key, value = call.query, call.key, call.value
    here = query.device.type == "cpu" and query.dtype == key.dtype == value.dtype and call.stands_alone
    if not here or torch.is_autocast_enabled("cpu"):
        return None
    mask = call.mask
    whole = sees_all(mask)
    if mask.given is not None or mask.fault is not None or (mask.changed and not whole):
        return None
    if bias is not None:
        bias = bias[:, :, None].to(torch.float64 if query.dtype == torch.float64 else torch.float32)
    found: tuple[torch.Tensor, torch.Tensor] | None
    if whole:  # one row, which no rule needs to be made for
        kwargs = call.kwargs
        has_terms = kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None
        tensors = (query, key, value) if bias is None else (query, key, value, bias)
        plain = not has_terms and kwargs.get("s_aux") is None and runs_on(*tensors)
        found = flash(query, key, value, call.scaling, hidden=bias) if plain else None
    else:
        found = in_one_call(query, key, value, call.rule(), added=bias)
    return None if found is None else (found[0].transpose(1, 2), found[1])


def attend_half_row(call: AttentionCall, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Output `(B, 1, H, Dv)` of a call of one row in half precision and its log-sum-exp `(B, H, 1)`, in float32.

    torch's kernel for CPUs reads keys of half precision as they are, without copying them, and sums in float32. `None`
    where it does not compute the call: elsewhere, with gradients, while compiling.

    Args:
        call: of attention.
        bias: `(B or 1, H, Tk)`, added to the logits in float32.
    """
    query, key, value, kwargs = call.query, call.key, call.value, call.kwargs
    on_cpu = query.shape[2] == 1 and query.device.type == "cpu" and not torch.compiler.is_compiling()
    alike = query.dtype == key.dtype == value.dtype and torch.finfo(key.dtype).bits == 16
    if not (on_cpu and alike and call.stands_alone and kwargs.get("s_aux") is None and kwargs.get("softcap") is None):
        return None
    given = kwargs.get("position_bias")
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (query, key, value, bias, given)
    ):
        return None
    visible = call.mask.seen()
    terms = (
        None if bias is None else bias[:, :, None],
        None if given is None else given[..., : key.shape[2]],
        call.mask.added(),
    )
    added = torch.zeros(())
    for term in terms:
        added = added if term is None else added + term.to(added.dtype)
    hidden = torch.where(visible, added, float("-inf"))
    output, lse = flash(query, key, value, call.scaling, hidden=hidden)
    return output.transpose(1, 2), lse.masked_fill(~visible.any(-1), float("-inf"))


def of_groups(rows: torch.Tensor, of_kv: torch.Tensor) -> torch.Tensor:
    """`(B, H, R, n)`: rows `(B, H, R, m)` times the matrix `(B, Hkv, m, n)` of their kv head, which is not repeated."""
    groups, heads = of_kv.shape[1], rows.shape[1]
    stacked = rows.unflatten(1, (groups, -1)).flatten(2, 3)
    return (stacked @ of_kv).unflatten(2, (heads // groups, -1)).flatten(1, 2)


def capped_logits(call: AttentionCall, query: torch.Tensor) -> torch.Tensor:
    """`(B, H, R, Tk)` in float32 at least, of queries `(B, H, R, D)`: scaled and capped, without biases and mask."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    logits = of_groups(query.to(dtype), call.key.to(dtype).mT) * call.scaling
    cap = call.kwargs.get("softcap")
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _logits(call: AttentionCall, visible: torch.Tensor) -> torch.Tensor:
    """`(B, H, R, Tk)` in float32 at least."""
    logits = capped_logits(call, call.query)
    bias = call.kwargs.get("position_bias")
    if bias is not None:
        logits = logits + bias[..., : logits.shape[-1]].to(logits.dtype)
    added = call.mask.added()
    if added is not None:
        logits = logits + added.to(logits.dtype).where(visible, 0.0)
    return logits.masked_fill(~visible, HIDDEN)


def some_rows(call: AttentionCall, start: int, end: int) -> AttentionCall:
    """The call of some of its rows, one after the other; itself, if of all."""
    if end - start == call.query.shape[2]:
        return call
    rows = torch.arange(start, end, device=call.query.device)
    kwargs, bias = call.kwargs, call.kwargs.get("position_bias")
    if bias is not None and bias.shape[2] > 1:
        kwargs = {**kwargs, "position_bias": bias[:, :, start:end]}
    return call.replace(
        query=call.query[:, :, start:end],
        mask=call.mask.of_rows(rows),
        kwargs=kwargs,
        context=call.context.of_rows(rows),
    )
