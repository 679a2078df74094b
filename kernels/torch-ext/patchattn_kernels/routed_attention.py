"""Attention of the (token, query head) pairs that a gate keeps (MoH, arXiv 2410.11842): the others cost nothing."""

import torch

from .routing import apply_head_gate
from .rows import AttentionRule, blocks, full_precision, log_sum_exp, row_logits, weights_of


def routed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gate: torch.Tensor, rule: AttentionRule
) -> torch.Tensor:
    """`gate * softmax(q k^T * scaling) v` for every token and query head whose gate is not zero; zeros elsewhere.

    A row that sees no key gives zeros.

    Args:
        query: `(B, H, Tq, D)`.
        key, value: `(B, G, Tk, D)` and `(B, G, Tk, Dv)`; H is a multiple of G.
        gate: `(B, Tq, H)`; 0 removes a head for a token, and has no gradient there.
        rule: scaling and visibility.

    Returns:
        `(B, H, Tq, Dv)` in the dtype of `value`; `.transpose(1, 2)` of it is contiguous.
    """
    return _reference(query, key, value, gate, rule)


def _reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gate: torch.Tensor, rule: AttentionRule
) -> torch.Tensor:
    with torch.autocast(query.device.type, enabled=False):
        query, key, wide = full_precision(query), full_precision(key), full_precision(value)
        batch, heads, rows, _ = query.shape
        outputs = []
        for part in blocks(rows, batch * heads * key.shape[2]):
            logits = row_logits(query, key, rule, part)
            weights = weights_of(logits, log_sum_exp(logits, rule))
            product = weights.reshape(batch, wide.shape[1], -1, weights.shape[-1]) @ wide
            outputs.append(product.view(batch, heads, -1, wide.shape[-1]).transpose(1, 2))
        return apply_head_gate(torch.cat(outputs, dim=1), gate).to(value.dtype).transpose(1, 2)
