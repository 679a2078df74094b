"""Head routing: which query heads a token keeps (MoH, arXiv 2410.11842).

Reference implementations in plain torch. Shapes: B batch, T tokens, H query heads, R routed heads, D head dim.
"""

import torch


def head_norms(query: torch.Tensor) -> torch.Tensor:
    """Euclidean norm of every query vector, in float32 at least.

    Args:
        query: `(B, H, T, D)`.

    Returns:
        `(B, T, H)`. Rotary embeddings keep norms, so a query taken before or after them gives the same result.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    return torch.linalg.vector_norm(query, dim=-1, dtype=dtype).transpose(1, 2)


def normalized_scores(norms: torch.Tensor) -> torch.Tensor:
    """Router probabilities of the parameter-free router: softmax(norm / std(norms of the routed heads)).

    Args:
        norms: `(B, T, R)` query norms of the routed heads.

    Returns:
        `(B, T, R)` probabilities. With one routed head, or with equal norms, the unbiased standard deviation is
        undefined or zero; the norms then carry no preference and the probabilities are uniform.
    """
    if norms.shape[-1] < 2:
        return torch.ones_like(norms)
    variance = norms.var(dim=-1, keepdim=True, unbiased=True)
    spread = variance > 0
    # sqrt has an infinite slope at zero: keep that point out of the graph, not only out of the result
    std = torch.where(spread, variance, 1.0).sqrt()
    return torch.softmax(torch.where(spread, norms / std, 0.0), dim=-1)


def select_top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """0/1 mask, same shape and dtype as `scores`, of the `k` largest entries of the last dimension."""
    if k == 0:
        return torch.zeros_like(scores)
    return torch.zeros_like(scores).scatter_(-1, scores.topk(k, dim=-1).indices, 1.0)


def straight_through(mask: torch.Tensor, scores: torch.Tensor, through_closed: bool = False) -> torch.Tensor:
    """The value of `mask` with the gradient of scores (straight-through estimator).

    Args:
        mask: 0 and 1.
        scores: of the shape of `mask`.
        through_closed: pass on the gradient of all `scores`, else of those alone that `mask` keeps.
    """
    soft = scores if through_closed else mask * scores
    return mask + (soft - soft.detach())


def apply_head_gate(output: torch.Tensor, gate: torch.Tensor, through_closed: bool = False) -> torch.Tensor:
    """Scale every head's output per token, before the output projection.

    Args:
        output: `(B, T, H, D)` attention output.
        gate: `(B, T, H)`; 0 removes a head for a token.
        through_closed: give the gradient of what it removes to a closed gate; else that is zero.

    Returns:
        `(B, T, H, D)` in the dtype of `output`. With gradients, a closed gate gives exact zeros, and finite gradients,
        also where `output` is not finite, as on rows that see no key.
    """
    gate = gate.to(output.dtype).unsqueeze(-1)
    if not torch.is_grad_enabled():
        return output * gate
    # cleared before the product: NaN times an upstream gradient of zero would reach the gate's gradient
    hidden = (gate == 0) & ~output.isfinite() if through_closed else gate == 0
    return output.masked_fill(hidden, 0.0) * gate
