"""Attention of the (token, query head) pairs that a gate keeps (MoH, arXiv 2410.11842): the others cost nothing."""

from typing import Any

import torch

from .backend import chosen_backend, rowwise, triton_runs
from .key_mask import KeyMask, key_mask, unsupported
from .namespace import add_op_namespace_prefix
from .routed_attention_cpu import SHORTEST, routed_on_cpu
from .routing import apply_head_gate
from .rows import (
    AttentionRule,
    are_few,
    blocks,
    empty_attention,
    full_precision,
    is_empty,
    log_sum_exp,
    row_logits,
    weights_of,
)

# Share of active heads from which dense attention is taken for prefills on a GPU. Assumed, not measured: tuned dense
# kernels are about a third faster per pair than ours are meant to be.
DENSE_FROM = 0.75


def routed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gate: torch.Tensor, rule: AttentionRule
) -> torch.Tensor:
    """`gate * softmax(q k^T * scaling) v` for every token and query head whose gate is not zero; zeros elsewhere.

    A row that sees no key gives zeros, and an empty batch or sequence an empty result. Triton's kernels compute in the
    dtype of `value`, with sums in float32.

    Args:
        query: `(B, H, Tq, D)`.
        key: `(B, G, Tk, D)`; H is a multiple of G.
        value: `(B, G, Tk, Dv)`.
        gate: `(B, Tq, H)`; 0 removes a head for a token, and has no gradient there.
        rule: scaling and visibility.

    Returns:
        `(B, H, Tq, Dv)` in the dtype of `value`; `.transpose(1, 2)` of it is contiguous.
    """
    output = routed_attention_if_faster(query, key, value, gate, rule)
    return _reference(query, key, value, gate, rule) if output is None else output


def may_be_routed(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether `routed_attention_if_faster` may compute calls of these shapes on this device; cheap, as asked for every
    token that is decoded."""
    is_short = 0 < min(query.shape[2], key.shape[2]) < SHORTEST and len(query) > 0
    return not is_short or query.device.type != "cpu" or chosen_backend() == "triton"


def routed_attention_if_faster(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    rule: AttentionRule,
    *,
    active: float | None = None,
) -> torch.Tensor | None:
    """`routed_attention`, or `None` where dense attention with `apply_head_gate` after it is better.

    Triton's kernels compute it where they run, prefills only if less than a share DENSE_FROM of the pairs is `active`
    or they are insisted on; elsewhere on a CPU, rows are gathered for SDPA where that is faster.

    Args:
        query: as of `routed_attention`.
        key: as of `routed_attention`.
        value: as of `routed_attention`.
        gate: as of `routed_attention`.
        rule: as of `routed_attention`.
        active: share of the heads that each token keeps, as it is configured: to count the gate would make the host
            wait for a GPU. `None`: it is not known, and the kernels are taken.

    Raises:
        NotImplementedError: PATCHATTN_KERNELS is `triton`, and the kernels cannot compute the call.
    """
    if is_empty(query, key):
        with torch.autocast(query.device.type, enabled=False):
            output = empty_attention(query, key, value, rule)[0].to(value.dtype)
            return apply_head_gate(output.transpose(1, 2).contiguous(), gate).transpose(1, 2)
    if triton_runs(query, lacking=_lacking(query, value, rule)):
        if active is not None and active >= DENSE_FROM and not are_few(query, key) and chosen_backend() == "auto":
            return None
        mask = key_mask(rule, query.shape[2], key.shape[2], query.device)
        query, key = query.to(value.dtype), key.to(value.dtype)
        output, _ = _forward(query, key, value, gate.float(), *mask, rule.scaling)
        return output.transpose(1, 2)
    if chosen_backend() == "auto" and query.device.type == "cpu":
        return routed_on_cpu(query, key, value, gate, rule)
    return None


def _lacking(query: torch.Tensor, value: torch.Tensor, rule: AttentionRule) -> str | None:
    """What Triton's kernels cannot do of what a call needs, in words."""
    if value.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"values are in {value.dtype}"
    if max(query.shape[-1], value.shape[-1]) > 256:
        return f"heads have {max(query.shape[-1], value.shape[-1])} dimensions, more than 256"
    if rule.scaling <= 0:
        return f"the scaling {rule.scaling} is not positive"
    return unsupported(rule)


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


@torch.library.custom_op(add_op_namespace_prefix("routed_attention"), mutates_args=())
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    mask: torch.Tensor | None,
    first: torch.Tensor | None,
    last: torch.Tensor | None,
    causal: bool,
    offset: int,
    window: int,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(B, Tq, H, Dv)`, and the log-sum-exps `(B, Tq, H)`."""
    from . import routed_attention_triton

    seen = KeyMask(mask, first, last, causal, offset, window)
    operands = (rowwise(query), rowwise(key), rowwise(value), gate.contiguous())
    return routed_attention_triton.forward(*operands, seen, scaling)


@torch.library.custom_op(add_op_namespace_prefix("routed_attention_backward"), mutates_args=())
def _backward(
    upstream: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor | None,
    first: torch.Tensor | None,
    last: torch.Tensor | None,
    causal: bool,
    offset: int,
    window: int,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of queries `(B, Tq, H, D)`, keys `(B, Tk, G, D)`, values `(B, Tk, G, Dv)` and gates `(B, Tq, H)`."""
    from . import routed_attention_backward_triton

    seen = KeyMask(mask, first, last, causal, offset, window)
    operands = (upstream.contiguous(), rowwise(query), rowwise(key), rowwise(value), gate.contiguous())
    return routed_attention_backward_triton.backward(*operands, output, lse, seen, scaling)


@_forward.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gate: torch.Tensor, *_: Any) -> Any:
    batch, queries, heads = gate.shape
    return value.new_empty(batch, queries, heads, value.shape[-1]), gate.new_empty(batch, queries, heads)


@_backward.register_fake
def _(
    upstream: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gate: torch.Tensor, *_: Any
) -> Any:
    (batch, queries, heads), groups, keys = gate.shape, *key.shape[1:3]
    return (
        query.new_empty(batch, queries, heads, query.shape[-1]),
        key.new_empty(batch, keys, groups, key.shape[-1]),
        value.new_empty(batch, keys, groups, value.shape[-1]),
        gate.new_empty(batch, queries, heads),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, causal, offset, window, scaling = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.rule = (causal, offset, window, scaling)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, upstream: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    query, key, value, gate, *mask, output, lse = ctx.saved_tensors
    *states, gates = _backward(upstream, query, key, value, gate, output, lse, *mask, *ctx.rule)
    return (*(state.transpose(1, 2) for state in states), gates, *7 * [None])


_forward.register_autograd(_gradients, setup_context=_keep)
