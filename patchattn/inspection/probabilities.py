"""Attention weights of a call, computed anew for statistics, and masks as statistics count them."""

import torch

from ..core.call import AttentionCall


def attention_probabilities(call: AttentionCall, head: int, seen: torch.Tensor | None = None) -> torch.Tensor:
    """Attention of one query head, computed anew whatever the base implementation, in float32 at least.

    Dropout is left out, and sinks are counted: a row then sums to less than 1.

    Args:
        call: of attention.
        head: query head.
        seen: `(B or 1, H or 1, Tq, Tk)` of `call.mask.seen()`, where it is at hand.

    Returns:
        `(B, Tq, Tk)`. Rows that see no key are zero.
    """
    visible = of_head(call.mask.seen() if seen is None else seen, head)
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    group = head * call.key.shape[1] // call.query.shape[1]
    logits = call.query[:, head].to(dtype) @ call.key[:, group].to(dtype).mT * call.scaling
    cap, sinks = call.kwargs.get("softcap"), call.kwargs.get("s_aux")
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    for bias in (call.kwargs.get("position_bias"), call.mask.added()):
        if bias is not None:
            logits = logits + of_head(bias, head)[..., : logits.shape[-1]]
    logits = logits.masked_fill(~visible, torch.finfo(dtype).min)
    if sinks is not None:
        logits = torch.cat([logits, sinks[head].to(dtype).expand(*logits.shape[:-1], 1)], dim=-1)
    return logits.softmax(dim=-1)[..., : visible.shape[-1]] * visible


def all_probabilities(call: AttentionCall) -> torch.Tensor:
    """`(B, H, Tq, Tk)` of all heads."""
    seen = call.mask.seen()
    return torch.stack([attention_probabilities(call, head, seen) for head in range(call.query.shape[1])], dim=1)


def of_head(pairs: torch.Tensor, head: int) -> torch.Tensor:
    """`(B or 1, Tq, Tk)` of `(B or 1, H or 1, Tq, Tk)`."""
    return pairs[:, min(head, pairs.shape[1] - 1)]


def seen_by_all_heads(call: AttentionCall) -> torch.Tensor:
    """`(B or 1, Tq, Tk)` bool: what queries see, for statistics that count alike in all heads.

    Raises:
        NotImplementedError: heads differ in what they see.
    """
    seen = call.mask.seen()
    if seen.shape[1] > 1 and not bool((seen == seen[:, :1]).all()):
        raise NotImplementedError(
            "The attention mask shows different keys to different heads: such masks per head are not supported here."
        )
    return seen[:, 0]
