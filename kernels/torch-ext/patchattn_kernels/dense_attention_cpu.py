"""Attention, its log-sum-exp and column mass on a CPU where queries see all real keys, or those up to their own.

Each query block reads the keys that it sees and no others, in memory that is used again; no Tq x Tk mask is made.
Without a graph: torch's kernel has no gradient of its log-sum-exp.
"""

import torch
import torch.nn.functional as F

from .backend import chosen_backend
from .rows import AttentionRule, full_precision

ROWS = 128  # queries that share their keys
TILE = 2**19  # weights that are held at a time: they stay in a cache
_flash = torch._scaled_dot_product_flash_attention_for_cpu


def runs_on(*tensors: torch.Tensor) -> bool:
    """Whether what is here may compute with these: not where one of them needs a gradient, or the call is compiled."""
    follows_gradients = torch.is_grad_enabled()
    for tensor in tensors:
        if not tensor.is_cpu or (follows_gradients and tensor.requires_grad):
            return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    return chosen_backend() == "auto"


def computes(rule: AttentionRule, *tensors: torch.Tensor) -> bool:
    """Whether `mass_by_prefix` computes a call: plain logits, no keys hidden but by causality and as padding.

    Args:
        rule: scaling and visibility.
        tensors: operands, as of `runs_on`.
    """
    if rule.softcap is not None or rule.bias is not None or rule.sinks is not None:
        return False
    if rule.window is not None or rule.sequence is not None or (rule.mask is not None and rule.mask.dim() > 2):
        return False
    return runs_on(*tensors)


def in_one_call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rule: AttentionRule,
    *,
    added: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Attention and log-sum-exp by one call of torch's kernel without a mask; `None` where that is not what is asked.

    Args:
        query: `(B, H, Tq, D)`.
        key: `(B, G, Tk, D)`.
        value: `(B, G, Tk, Dv)`.
        rule: scaling and visibility.
        added: `(B or 1, H or 1, Tq or 1, Tk)` further to the logits, in the dtype of the log-sum-exp.
    """
    needed = (query, key, value) if added is None else (query, key, value, added)
    if not computes(rule, *needed) or rule.mask is not None:
        return None
    queries, keys = query.shape[2], key.shape[2]
    offset = keys - queries if rule.offset is None else rule.offset
    causal = rule.causal and offset + 1 < keys  # else the first query sees all keys already
    if causal and (offset != 0 or queries != keys):
        return None
    return flash(query, key, value, rule.scaling, causal=causal, hidden=added)


def flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    *,
    causal: bool = False,
    hidden: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention `(B, H, Tq, Dv)` by torch's kernel and its log-sum-exp `(B, H, Tq)`; every query must see a key.

    Args:
        query: `(B, H, Tq, D)`.
        key: `(B, G, Tk, D)`.
        value: `(B, G, Tk, Dv)`.
        scaling: factor of the logits.
        causal: query i sees the keys up to i.
        hidden: `(B or 1, H or 1, Tq or 1, Tk)` added to the logits, such as 0 or -inf.
    """
    dim, width = query.shape[-1], value.shape[-1]
    # torch's kernel wants as many channels of values as of queries: zeros change neither logits nor the rest; padding
    # by none copies
    if width > dim:
        query, key = F.pad(query, (0, width - dim)), F.pad(key, (0, width - dim))
    elif dim > width:
        value = F.pad(value, (0, dim - width))
    # It takes the channels of a vector for neighbours in memory, whatever their stride is.
    query, key, value = [each if each.stride(-1) == 1 else each.contiguous() for each in (query, key, value)]
    output, lse = _flash(query, key, value, 0.0, causal, attn_mask=hidden, scale=scaling)
    return output if dim <= width else output[..., :width], lse


def merged(
    output: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to the keys of two parts, and its log-sum-exp, from those of each part; in the dtype of the latter.

    A query must see a key of one part at least.
    """
    share = torch.sigmoid(lse - other_lse)[..., None]
    return torch.lerp(other.to(lse.dtype), output.to(lse.dtype), share), torch.logaddexp(lse, other_lse)


def mass_by_prefix(
    query: torch.Tensor,
    key: torch.Tensor,
    rule: AttentionRule,
    lse: torch.Tensor | None,
    real: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`column_mass` of a call that it `computes`; arguments and results as there, operands in full precision."""
    batch, heads, queries, dim = query.shape
    groups, keys = key.shape[1], key.shape[2]
    repeats = heads // groups
    offset = keys - queries if rule.offset is None else rule.offset
    query = query.reshape(batch * groups, repeats, queries, dim)
    key = key.reshape(batch * groups, keys, dim)
    mass = query.new_zeros(batch * groups, repeats, keys)
    known, scaling = lse is not None, rule.scaling
    lse = query.new_empty(batch, heads, queries) if lse is None else full_precision(lse)
    sums = lse.reshape(batch * groups, repeats, queries)
    if known:  # it is taken off within the product, as one more channel, and not in a pass of its own
        taken = sums.clamp(min=torch.finfo(sums.dtype).min).neg()[..., None]
        query, scaling = torch.cat([query * scaling, taken], dim=-1), 1.0
        key = torch.cat([key, key.new_ones(*key.shape[:2], 1)], dim=-1)
    counted = query.new_ones(1, queries) if real is None else real.to(query.dtype)
    counted = counted.expand(batch, -1).repeat_interleave(groups, dim=0)[:, None]
    padding = None if rule.mask is None else ~rule.mask[:, :keys].bool().expand(batch, -1)
    padding = None if padding is None else padding.repeat_interleave(groups, dim=0)[:, None]
    largest = repeats * min(ROWS, queries) * keys  # of a kv head
    memory = query.new_empty(min(max(TILE, largest), batch * groups * largest))
    for start in range(0, queries, ROWS):
        stop = min(start + ROWS, queries)
        end = min(keys, max(0, offset + stop)) if rule.causal else keys
        if end == 0:
            if not known:
                sums[:, :, start:stop] = float("-inf")
            continue
        size = repeats * (stop - start)
        step = max(1, memory.numel() // (size * end))
        begin = min(end, max(0, offset + start + 1))  # no own key of these queries comes before the keys up to here
        own_keys = torch.arange(offset + start, offset + stop)
        later = torch.arange(begin, end) > own_keys[:, None] if rule.causal else None
        for first in range(0, batch * groups, step):
            some = slice(first, min(first + step, batch * groups))
            rows = query[some, :, start:stop].reshape(-1, size, query.shape[-1])
            tile = memory[: len(rows) * size * end].view(len(rows), size, end)
            torch.baddbmm(tile, rows, key[some, :end].mT, beta=0.0, alpha=scaling, out=tile)
            tile = tile.view(len(rows), repeats, stop - start, end)
            if later is not None:
                tile[..., begin:].masked_fill_(later, float("-inf"))
            if padding is not None:
                tile.masked_fill_(padding[some, None, :, :end], float("-inf"))
            own = sums[some, :, start:stop]
            if known:
                tile.exp_()
                shares = counted[some, :, start:stop].expand(-1, repeats, -1)
            else:
                top = tile.amax(dim=-1).clamp_(min=torch.finfo(own.dtype).min)
                total = tile.sub_(top[..., None]).exp_().sum(dim=-1)
                own.copy_(total.log() + top)
                shares = counted[some, :, start:stop] / total.where(total > 0.0, 1.0)
            mass[some, :, :end] += (shares[:, :, None] @ tile).squeeze(2)
    return mass.view(batch, heads, keys), lse if known else sums.view(batch, heads, queries)
