"""Attention to sinks and recent keys, or to listed blocks of keys (streaming heads, MSWA, MoBA): no other is read."""

from typing import Any, Literal, overload

import torch
from torch.utils.checkpoint import checkpoint

from .backend import triton_runs
from .block_lists import BlockLists, SinkAndRecent, check_counted
from .block_sparse_attention_cpu import gathered, gathered_backward, selected
from .key_mask import unsupported
from .namespace import add_op_namespace_prefix
from .rows import (
    AttentionRule,
    blocks,
    empty_attention,
    full_precision,
    is_empty,
    log_sum_exp,
    row_logits,
    weights_of,
)


@overload
def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keep: SinkAndRecent | BlockLists,
    rule: AttentionRule,
    *,
    return_lse: Literal[False] = False,
) -> torch.Tensor: ...


@overload
def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keep: SinkAndRecent | BlockLists,
    rule: AttentionRule,
    *,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keep: SinkAndRecent | BlockLists,
    rule: AttentionRule,
    *,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`softmax(q k^T * scaling) v` over the keys that `keep` and the rule both show to a query; the rest is not read.

    With `SinkAndRecent` head h of a query with own key i sees key j where `n_j <= sinks[h]` or `|n_i - n_j| <
    recent[h]`; `n_j` counts the real keys up to j, itself included, from the start of j's sequence where several are
    packed. Without padding that is `j < sinks[h]` or `|i - j| < recent[h]`, to the key and not to the block. With
    `BlockLists` a query sees the keys of the blocks that are listed for its block. A row that sees no key gives zeros.

    Args:
        query: `(B, H, Tq, D)`.
        key: `(B, G, Tk, D)`; H is a multiple of G.
        value: `(B, G, Tk, Dv)`.
        keep: what is read, per query head.
        rule: scaling and visibility.
        return_lse: whether the log-sum-exp of the rows is returned too, as parts of an attention are merged by it.

    Returns:
        `(B, H, Tq, Dv)` in the dtype of `value`; `.transpose(1, 2)` of it is contiguous. On request also `(B, H, Tq)`
        in float32 at least, -inf where a query sees nothing. Both have gradients.

    Raises:
        ValueError: shapes do not fit each other, or own keys of queries are not among the keys.
        NotImplementedError: PATCHATTN_KERNELS is `triton`, and the kernel cannot compute the call; or sinks of a rule
            that is `uncounted`.
    """
    _check(query, key, value, keep, rule)
    lacking = unsupported(rule)
    if lacking is None and isinstance(keep, SinkAndRecent):
        if rule.order is not None:
            lacking = "sinks and recent keys are counted among more keys than these"
        elif rule.place is not None:
            lacking = "sinks are counted from the start of packed sequences"
    if is_empty(query, key):
        with torch.autocast(query.device.type, enabled=False):
            output, _, lse = empty_attention(query, key, value, rule)
            output = output.transpose(1, 2).contiguous().transpose(1, 2)
    elif lacking is not None:
        triton_runs(query, lacking=lacking)  # refuses where the kernel is insisted on
        output, lse = _reference(query, key, value, keep, rule)
    else:
        dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
        operands = (tensor.to(dtype) for tensor in (query, key, value))
        output, lse = _forward(*operands, *_flat(keep, rule))
    output = output.to(value.dtype)
    return (output, lse) if return_lse else output


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keep: SinkAndRecent | BlockLists,
    rule: AttentionRule,
) -> None:
    batch, heads, rows, dim = query.shape
    groups, keys = key.shape[1], key.shape[2]
    if key.shape != (batch, groups, keys, dim) or value.shape[:3] != key.shape[:3] or heads % groups:
        raise ValueError(
            "Expected query (B, H, Tq, D), key (B, G, Tk, D) and value (B, G, Tk, Dv), H a multiple of G, got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}."
        )
    if isinstance(keep, SinkAndRecent):
        check_counted(keep, uncounted=rule.uncounted)
        if keep.sinks.shape != (heads,) or keep.recent.shape != (heads,):
            raise ValueError(
                f"Expected sinks and recent of {heads} heads, got {tuple(keep.sinks.shape)} and "
                f"{tuple(keep.recent.shape)}. Make them with sink_and_recent(..., heads={heads})."
            )
        offset = keys - rows if rule.offset is None else rule.offset
        if rule.own is None and not is_empty(query, key) and (offset < 0 or offset + rows > keys):
            raise ValueError(
                f"Recent keys are counted back from the queries' own keys {offset} to {offset + rows - 1}, which must "
                f"be among the {keys} keys. Set AttentionRule.offset to the first query's."
            )
        return
    shape = keep.indices.shape
    blocks_q = -(-rows // keep.block_q)
    if len(shape) != 4 or shape[0] not in (1, batch) or shape[1] not in (1, heads) or shape[2] != blocks_q:
        raise ValueError(
            f"Expected lists ({batch} or 1, {heads} or 1, {blocks_q}, N) for {rows} queries in blocks of "
            f"{keep.block_q}, got {tuple(shape)}."
        )
    if keep.counts.shape != shape[:3]:
        raise ValueError(f"Expected counts {tuple(shape[:3])} as lists have them, got {tuple(keep.counts.shape)}.")


def _reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keep: SinkAndRecent | BlockLists,
    rule: AttentionRule,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense and masked, some rows at a time: for every rule, with gradients of its bias and sinks."""

    def some(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, part: slice) -> tuple[torch.Tensor, ...]:
        seen = selected(keep, rule, part, (query.shape[2], key.shape[2]), key.device)
        logits = row_logits(query, key, rule, part).masked_fill(~seen, float("-inf"))
        lse = log_sum_exp(logits, rule)
        weights = weights_of(logits, lse)
        product = weights.reshape(len(value), value.shape[1], -1, weights.shape[-1]) @ value
        return product.view(*lse.shape, -1), lse

    with torch.autocast(query.device.type, enabled=False):
        query, key, value = full_precision(query), full_precision(key), full_precision(value)
        outputs, sums = [], []
        for part in blocks(query.shape[2], query.shape[0] * query.shape[1] * key.shape[2]):
            if torch.is_grad_enabled():  # weights are made anew in the backward pass: memory stays linear in the rows
                output, lse = checkpoint(some, query, key, value, part, use_reentrant=False, preserve_rng_state=False)
            else:
                output, lse = some(query, key, value, part)
            outputs.append(output.transpose(1, 2))
            sums.append(lse)
        return torch.cat(outputs, dim=1).transpose(1, 2), torch.cat(sums, dim=2)


# Operators take tensors and numbers: a rule that is not `unsupported` and what is kept, laid flat


def _flat(keep: SinkAndRecent | BlockLists, rule: AttentionRule) -> tuple[Any, ...]:
    sizes = [keep.most_sinks] if isinstance(keep, SinkAndRecent) else [keep.block_q, keep.block_k]
    return (
        *(keep[0], keep[1], sizes, rule.mask, rule.sequence),
        *(float(rule.scaling), rule.causal, rule.offset, rule.window),
    )


def _unflat(
    first: torch.Tensor,
    second: torch.Tensor,
    sizes: list[int],
    mask: torch.Tensor | None,
    sequence: torch.Tensor | None,
    scaling: float,
    causal: bool,
    offset: int | None,
    window: int | None,
) -> tuple[SinkAndRecent | BlockLists, AttentionRule]:
    keep = SinkAndRecent(first, second, *sizes) if len(sizes) == 1 else BlockLists(first, second, *sizes)
    rule = AttentionRule(scaling, mask=mask, causal=causal, offset=offset, window=window, sequence=sequence)
    return keep, rule


def _lacking(
    query: torch.Tensor, value: torch.Tensor, keep: SinkAndRecent | BlockLists, rule: AttentionRule
) -> str | None:
    """What of a call Triton's kernels do not compute, of those that come here."""
    if value.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"operands are in {value.dtype}"
    if max(query.shape[-1], value.shape[-1]) > 256:
        return f"heads have {max(query.shape[-1], value.shape[-1])} dimensions, more than 256"
    if isinstance(keep, SinkAndRecent):
        return "sinks are counted from the start of packed sequences" if rule.sequence is not None else None
    sizes = (keep.block_q, keep.block_k)
    if any(size & (size - 1) for size in sizes) or keep.block_k < 16:
        return f"blocks must be powers of two, those of keys at least 16, and are {sizes}"
    return None


@torch.library.custom_op(add_op_namespace_prefix("block_sparse_attention"), mutates_args=())
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    sizes: list[int],
    mask: torch.Tensor | None,
    sequence: torch.Tensor | None,
    scaling: float,
    causal: bool,
    offset: int | None,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    keep, rule = _unflat(first, second, sizes, mask, sequence, scaling, causal, offset, window)
    if triton_runs(query, lacking=_lacking(query, value, keep, rule)):
        from .block_sparse_attention_triton import forward

        return forward(query, key, value, keep, rule)
    return gathered(query, key, value, keep, rule)


@torch.library.custom_op(add_op_namespace_prefix("block_sparse_attention_backward"), mutates_args=())
def _backward(
    gradient: torch.Tensor,
    lse_gradient: torch.Tensor | None,
    output: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    sizes: list[int],
    mask: torch.Tensor | None,
    sequence: torch.Tensor | None,
    scaling: float,
    causal: bool,
    offset: int | None,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keep, rule = _unflat(first, second, sizes, mask, sequence, scaling, causal, offset, window)
    operands = (gradient, lse_gradient, output, lse, query, key, value, keep, rule)
    if triton_runs(query, lacking=_lacking(query, value, keep, rule)):
        from .block_sparse_attention_backward_triton import backward

        return backward(*operands)
    return gathered_backward(*operands)


@_forward.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, rows, _dim = query.shape
    lse = query.new_empty(batch, heads, rows, dtype=torch.promote_types(query.dtype, torch.float32))
    return value.new_empty(batch, rows, heads, value.shape[-1]).transpose(1, 2), lse


@_backward.register_fake
def _(
    gradient: torch.Tensor,
    lse_gradient: torch.Tensor | None,
    output: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, first, second, sizes, mask, sequence, *numbers = inputs
    ctx.save_for_backward(*output, query, key, value, first, second, mask, sequence)
    ctx.sizes, ctx.numbers = sizes, numbers
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, gradient: torch.Tensor | None, lse_gradient: torch.Tensor | None) -> tuple[Any, ...]:
    output, lse, query, key, value, first, second, mask, sequence = ctx.saved_tensors
    gradient = torch.zeros_like(output) if gradient is None else gradient
    operands = (output, lse, query, key, value, first, second, ctx.sizes, mask, sequence, *ctx.numbers)
    return (*_backward(gradient, lse_gradient, *operands), *([None] * 9))


_forward.register_autograd(_gradients, setup_context=_save)
