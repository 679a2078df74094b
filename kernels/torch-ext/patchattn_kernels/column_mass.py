"""Attention that each key receives, in memory linear in the keys (ACT, arXiv 2406.15765)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .backend import triton_runs
from .column_mass_ops import column_mass_op, key_counts_op
from .dense_attention_cpu import computes, mass_by_prefix
from .key_mask import key_mask, unsupported
from .rows import (
    AttentionRule,
    blocks,
    empty_weights,
    full_precision,
    is_empty,
    log_sum_exp,
    row_logits,
    weights_of,
)
from .split_attention import kernels_lack, same_dtype
from .split_attention_ops import log_sum_exp as log_sum_exp_op


class KeyCounts(NamedTuple):
    """What a mask says of every key.

    Every field is `(B or 1, H, Tk)` where the mask has more than one head.

    Attributes:
        rows: `(B or 1, Tk)` number of real queries that see it.
        longest: `(B or 1, Tk)` most keys that any of those sees: the length of its sequence, or the window.
        first: `(B or 1, Tk)` bool: no query that sees it sees a key before it.
    """

    rows: torch.Tensor
    longest: torch.Tensor
    first: torch.Tensor


def column_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    rule: AttentionRule,
    *,
    lse: torch.Tensor | None = None,
    real: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over queries of the attention that each key receives, without a tensor of Tq x Tk.

    Args:
        query: `(B, H, Tq, D)`.
        key: `(B, G, Tk, D)`; H is a multiple of G.
        rule: scaling and visibility.
        lse: `(B, H, Tq)` log-sum-exp of the rows, where an attention kernel gave it.
        real: `(B or 1, Tq)` bool: the queries that count; the others are padding.

    Returns:
        The sums `(B, H, Tk)` and the log-sum-exp `(B, H, Tq)`, in float32 at least.
    """
    with torch.autocast(query.device.type, enabled=False):
        if is_empty(query, key):
            weights, lse = empty_weights(query, key, rule, lse)
            return weights.sum(dim=2), lse
        if triton_runs(query, lacking=kernels_lack(rule, query, key)):
            query, key = same_dtype(query, key)
            mask = key_mask(rule, query.shape[2], key.shape[2], query.device)
            lse = log_sum_exp_op(query, key, rule.scaling, *mask) if lse is None else lse
            return column_mass_op(query, key, lse, real, rule.scaling, *mask), lse
        query, key = full_precision(query), full_precision(key)
        if computes(rule, query, key, *([] if lse is None else [lse])):
            return mass_by_prefix(query, key, rule, lse, real)
        batch, heads, rows, _ = query.shape
        mass = query.new_zeros(batch, heads, key.shape[2])
        sums = []
        for part in blocks(rows, batch * heads * key.shape[2]):
            logits = row_logits(query, key, rule, part)
            sums.append(log_sum_exp(logits, rule) if lse is None else lse[:, :, part])
            weights = weights_of(logits, sums[-1])
            if real is not None:
                weights = weights.masked_fill(~real[:, None, part, None], 0.0)
            mass = mass + weights.sum(dim=2)
        return mass, torch.cat(sums, dim=2)


def key_counts(
    rule: AttentionRule, queries: int, keys: int, device: torch.device, real: torch.Tensor | None = None
) -> KeyCounts:
    """Count, for every key, the queries that see it; without a tensor of Tq x Tk.

    Args:
        rule: visibility.
        queries: their number.
        keys: their number.
        device: where to.
        real: `(B or 1, Tq)` bool: the queries that count.
    """
    key = torch.arange(keys, device=device)
    sizes = [tensor.shape[:1] for tensor in (rule.mask, real) if tensor is not None]
    batch = torch.broadcast_shapes(*sizes, (1,))[0]
    if 0 in (batch, queries, keys):
        mask = rule.mask
        heads = mask.shape[1:2] if mask is not None and mask.dim() == 4 and mask.shape[1] > 1 else ()
        none = torch.zeros(batch, *heads, keys, dtype=torch.long, device=device)
        return KeyCounts(none, none.clone(), none.bool())
    if triton_runs(key, lacking=unsupported(rule)):
        rows, longest, first = key_counts_op(key, queries, keys, real, *key_mask(rule, queries, keys, device))
        return KeyCounts(rows.long(), longest.long(), first)
    if rule.window is None and rule.sequence is None and (rule.mask is None or rule.mask.dim() == 2):
        return _counts_in_closed_form(rule, queries, keys, device, real)
    seen = longest = earlier = torch.zeros(1, keys, dtype=torch.long, device=device)
    for part in blocks(queries, batch * keys):
        visible = rule.visible(part, (queries, keys), device)
        if real is not None:
            counted = real[:, part, None]
            visible = visible & (counted if visible.dim() == 3 else counted[:, None])
        first = visible.int().argmax(dim=-1, keepdim=True)
        seen = seen + visible.sum(dim=-2)
        longest = torch.maximum(longest, (visible * visible.sum(dim=-1, keepdim=True)).amax(dim=-2))
        earlier = earlier + (visible & (first < key)).sum(dim=-2)
    return KeyCounts(seen, longest, (seen > 0) & (earlier == 0))


def _counts_in_closed_form(
    rule: AttentionRule, queries: int, keys: int, device: torch.device, real: torch.Tensor | None
) -> KeyCounts:
    """`key_counts` where queries see all real keys, or those up to their own: sums along them say it."""
    counted = torch.ones(1, queries, dtype=torch.bool, device=device) if real is None else real
    there = torch.ones(1, keys, dtype=torch.bool, device=device) if rule.mask is None else rule.mask[:, :keys].bool()
    order = there.long().cumsum(-1)
    if rule.causal:
        offset = keys - queries if rule.offset is None else rule.offset
        later = F.pad(counted.long().flip(-1).cumsum(-1).flip(-1), (0, 1))  # queries from each one on
        rows = later[:, (torch.arange(keys, device=device) - offset).clamp(0, queries)]
        own = torch.arange(offset, offset + queries, device=device)
        last = own.where(counted, -1).amax(dim=-1, keepdim=True)
        batch = max(len(order), len(last))
        longest = order.expand(batch, -1).gather(-1, last.clamp(0, keys - 1).expand(batch, -1))
    else:
        rows, longest = counted.sum(dim=-1, keepdim=True), order[:, -1:]
    rows = rows * there
    return KeyCounts(rows, longest * (rows > 0), (rows > 0) & (order == 1))
