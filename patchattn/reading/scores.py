"""Scores of pages of keys, or of keys, for queries: the higher the better."""

import torch

from patchattn_kernels.rows import full_precision, log_sum_exp, row_logits, weights_of

from ..core.call import AttentionCall


def products(query: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
    """`(B, H, Tq, P)` of queries `(B, H, Tq, E)` with a vector of every page `(B, Hkv, P, E)`, in float32 at least."""
    query, facts = full_precision(query), full_precision(facts)
    grouped = query.reshape(len(query), facts.shape[1], -1, query.shape[-1])
    return (grouped @ facts.mT).view(*query.shape[:3], -1)


def upper_bounds(query: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`(B, H, Tq, P)` that no product of a query with a key of the page exceeds: Quest, section 3.3.

    A query's positive entries meet the greatest of the keys, its negative ones the least.

    Args:
        query: `(B, H, Tq, D)`.
        ends: `(B, Hkv, P, 2D)`, as `index.ends_of_pages` gives them.
    """
    return products(by_sign(query), ends)


def highest_products(query: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
    """`(B, Hkv, P)` the highest of the `products` of the query heads of each kv head; arguments as there, Tq = 1.

    With pages as the rows of the product they are read once, which takes half of the time where they are many.
    """
    query, facts = full_precision(query), full_precision(facts)
    return (facts @ query.reshape(*facts.shape[:2], -1, facts.shape[-1]).mT).amax(dim=-1)


def by_sign(query: torch.Tensor) -> torch.Tensor:
    """`(..., 2D)` its positive entries, and its negative ones behind them; zeros are in the place of the others."""
    return torch.cat([query.clamp(min=0), query.clamp(max=0)], dim=-1)


def weights_with(call: AttentionCall, keys: torch.Tensor) -> torch.Tensor:
    """`(B, H, Tq, Tk)` the weights of a call if its keys were these `(B, Hkv, Tk, D)`; 0 of what is not seen."""
    rule = call.rule()
    logits = row_logits(full_precision(call.query), full_precision(keys), rule, slice(0, call.query.shape[2]))
    return weights_of(logits, log_sum_exp(logits, rule))
