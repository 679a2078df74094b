"""Attention with a set of keys told apart: rescaling them needs no Tq x Tk weights (ACT, VAR)."""

from typing import NamedTuple

import torch

from .backend import triton_runs
from .dense_attention_cpu import in_one_call
from .key_mask import key_mask, unsupported
from .rows import (
    AttentionRule,
    blocks,
    empty_attention,
    full_precision,
    is_empty,
    log_sum_exp,
    row_logits,
    weights_of,
    with_heads,
)
from .split_attention_ops import attention, compact, key_set_part
from .split_attention_ops import log_sum_exp as log_sum_exp_op


class SplitAttention(NamedTuple):
    """Attention, and the share of a set of keys in it; float32 at least.

    Attributes:
        output: `(B, H, Tq, D)` of all keys.
        part: `(B, H, Tq, D)` of the keys of the set alone, under the same softmax.
        mass: `(B, H, Tq)` sum of their weights.
        lse: `(B, H, Tq)` log-sum-exp of the rows.
    """

    output: torch.Tensor
    part: torch.Tensor
    mass: torch.Tensor
    lse: torch.Tensor


def attention_with_lse(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: AttentionRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in full precision, `softmax(q k^T * scaling) v`, and the log-sum-exp of its rows.

    Args:
        query: `(B, H, Tq, D)`.
        key: `(B, G, Tk, D)`; H is a multiple of G.
        value: `(B, G, Tk, Dv)`.
        rule: scaling and visibility.

    Returns:
        `(B, H, Tq, Dv)`, zeros where a row sees nothing, and `(B, H, Tq)`, -inf there; float32 at least.
    """
    with torch.autocast(query.device.type, enabled=False):
        if is_empty(query, key):
            output, _, lse = empty_attention(query, key, value, rule)
            return output, lse
        if triton_runs(query, lacking=kernels_lack(rule, query, value)):
            query, key, value = same_dtype(query, key, value)
            mask = key_mask(rule, query.shape[2], key.shape[2], query.device)
            output, lse = attention(query, key, value, rule.scaling, *mask)
            return output, lse
        query, key, value = full_precision(query), full_precision(key), full_precision(value)
        found = in_one_call(query, key, value, rule)
        if found is not None:
            return found
        outputs, sums = [], []
        for block in blocks(query.shape[2], query.shape[:2].numel() * key.shape[2]):
            logits = row_logits(query, key, rule, block)
            sums.append(log_sum_exp(logits, rule))
            outputs.append(_times(weights_of(logits, sums[-1]), value))
        return torch.cat(outputs, dim=2), torch.cat(sums, dim=2)


def split_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_set: torch.Tensor,
    rule: AttentionRule,
    *,
    lse: torch.Tensor | None = None,
    output: torch.Tensor | None = None,
) -> SplitAttention:
    """Attention and the part of it that a set of keys has, without a tensor of Tq x Tk.

    With `lse` and `output` of `attention_with_lse` at hand only the keys of the set are read. `c (output - part) +
    beta part` then scales the set by beta and the rest by c.

    Args:
        query: `(B, H, Tq, D)`.
        key: `(B, G, Tk, D)`; H is a multiple of G.
        value: `(B, G, Tk, Dv)`.
        key_set: `(B, H, Tk)` bool.
        rule: scaling and visibility.
        lse: `(B, H, Tq)` log-sum-exp of the rows, where it is known.
        output: `(B, H, Tq, Dv)` attention over all keys, where it is known in full precision.
    """
    with torch.autocast(query.device.type, enabled=False):
        if is_empty(query, key):
            part, weights, lse = empty_attention(query, key, value, rule, lse)
            whole = part if output is None else full_precision(output)
            return SplitAttention(whole, part, weights.sum(dim=-1), lse)
        if triton_runs(query, lacking=kernels_lack(rule, query, value)):
            return _by_kernels(query, key, value, key_set, rule, lse, output)
        query, key, value = full_precision(query), full_precision(key), full_precision(value)
        waits = query.device.type != "cpu" or torch.compiler.is_compiling()  # to be told how many keys a set has
        if lse is not None and output is not None and not waits:
            part, mass = _of_set(query, key, value, key_set, rule, lse)
            return SplitAttention(full_precision(output), part, mass, lse)
        batch, heads, rows, _ = query.shape
        wholes, parts, masses, sums = [], [], [], []
        for block in blocks(rows, batch * heads * key.shape[2]):
            logits = row_logits(query, key, rule, block)
            sums.append(log_sum_exp(logits, rule) if lse is None else lse[:, :, block])
            weights = weights_of(logits, sums[-1])
            chosen = weights.masked_fill(~key_set[:, :, None], 0.0)
            masses.append(chosen.sum(dim=-1))
            parts.append(_times(chosen, value))
            wholes.append(_times(weights, value) if output is None else full_precision(output[:, :, block]))
        return SplitAttention(*(torch.cat(pieces, dim=2) for pieces in (wholes, parts, masses, sums)))


def kernels_lack(rule: AttentionRule, *tensors: torch.Tensor) -> str | None:
    """What the kernels of this file and of `column_mass` cannot do of a call, in words."""
    if rule.scaling <= 0.0:
        return f"the factor of the logits is {rule.scaling}, not positive"
    if any(tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32) for tensor in tensors):
        return f"its tensors are {tensors[0].dtype}"
    if any(tensor.shape[-1] > 256 for tensor in tensors):
        return "heads have more than 256 dimensions"
    return unsupported(rule)


def same_dtype(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """In the widest of their dtypes."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def _by_kernels(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_set: torch.Tensor,
    rule: AttentionRule,
    lse: torch.Tensor | None,
    output: torch.Tensor | None,
) -> SplitAttention:
    query, key, value = same_dtype(query, key, value)
    mask = key_mask(rule, query.shape[2], key.shape[2], query.device)
    if output is None:  # gives the lse besides
        output, found = attention(query, key, value, rule.scaling, *mask)
        lse = found if lse is None else lse
    elif lse is None:
        lse = log_sum_exp_op(query, key, rule.scaling, *mask)
    part, mass = key_set_part(query, key, value, lse, key_set, *compact(key_set), rule.scaling, *mask)
    return SplitAttention(full_precision(output), part, mass, lse)


def _times(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`(B, H, C, Tk)` times `(B, G, Tk, D)`, kv heads not repeated."""
    batch, heads, rows, keys = weights.shape
    product = weights.reshape(batch, value.shape[1], -1, keys) @ value
    return product.view(batch, heads, rows, -1)


def _of_set(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_set: torch.Tensor,
    rule: AttentionRule,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and mass of the keys of a set, which are gathered: `(B, H, Tq, D)` and `(B, H, Tq)`."""
    batch, heads, rows, _ = query.shape
    keys = key.shape[2]
    count = int(key_set.sum(dim=-1).max())
    if count == 0:
        return query.new_zeros(batch, heads, rows, value.shape[-1]), torch.zeros_like(lse)
    member, index = key_set.to(torch.uint8).topk(count, dim=-1)  # (B, H, S)
    group = torch.arange(heads, device=key.device) // (heads // key.shape[1])
    place = (torch.arange(batch, device=key.device)[:, None, None], group[None, :, None], index)
    keys_of, values_of = key[place], value[place]  # (B, H, S, D)
    parts, masses = [], []
    for block in blocks(rows, batch * max(heads * count, keys)):
        logits = query[:, :, block] @ keys_of.mT * rule.scaling
        if rule.softcap is not None:
            logits = torch.tanh(logits / rule.softcap) * rule.softcap
        columns = index[:, :, None].expand(-1, -1, logits.shape[2], -1)
        for term in rule.added(block, keys):
            logits = logits + term.expand(batch, heads, -1, -1).gather(-1, columns)
        visible = _seen_of(rule, block, (rows, keys), columns) & member.bool()[:, :, None]
        weights = weights_of(logits.masked_fill(~visible, float("-inf")), lse[:, :, block])
        parts.append(weights @ values_of)
        masses.append(weights.sum(dim=-1))
    if len(parts) == 1:  # cat copies
        return parts[0], masses[0]
    return torch.cat(parts, dim=2), torch.cat(masses, dim=2)


def _seen_of(rule: AttentionRule, rows: slice, shape: tuple[int, int], columns: torch.Tensor) -> torch.Tensor:
    """Which of the keys `columns` `(B, H, C, S)` a slice of queries sees: likewise; `shape` is (Tq, Tk) of all."""
    queries, keys = shape
    device = columns.device
    if rule.mask is not None or rule.window is not None or rule.sequence is not None:
        visible = with_heads(rule.visible(rows, shape, device))
        return visible.expand(*columns.shape[:2], -1, -1).gather(-1, columns)
    if not rule.causal:
        return torch.ones_like(columns, dtype=torch.bool)
    own = torch.arange(queries, device=device)[rows] + (keys - queries if rule.offset is None else rule.offset)
    return columns <= own[:, None]
