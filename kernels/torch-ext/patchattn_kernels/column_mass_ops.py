"""Triton's kernels of `column_mass` and `key_counts` as operators of torch."""

from typing import Any

import torch

from .key_mask import KeyMask
from .namespace import add_op_namespace_prefix
from .rows import AttentionRule, blocks, full_precision, row_logits, weights_of


@torch.library.custom_op(add_op_namespace_prefix("column_mass"), mutates_args=())
def column_mass_op(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    real: torch.Tensor | None,
    scaling: float,
    mask: torch.Tensor | None,
    first: torch.Tensor | None,
    last: torch.Tensor | None,
    causal: bool,
    offset: int,
    window: int,
) -> torch.Tensor:
    """`(B, H, Tk)` float32: sums over real queries of the weights, given the log-sum-exp; the mask is a `KeyMask`."""
    from . import column_mass_triton

    key_mask = KeyMask(mask, first, last, causal, offset, window)
    return column_mass_triton.column_mass(query, key, lse, real, scaling, key_mask)


@torch.library.custom_op(add_op_namespace_prefix("column_mass_backward"), mutates_args=())
def column_mass_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    real: torch.Tensor | None,
    of_mass: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None,
    causal: bool,
    offset: int,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries, keys and lse, in plain torch: ACT compares sums with a limit, which has no gradient."""
    rule = _rule(scaling, mask, causal, offset, window)
    wide, keys = full_precision(query), full_precision(key)
    groups, heads = key.shape[1], query.shape[1]
    of_query, of_lse, of_key = torch.empty_like(wide), torch.empty_like(lse), torch.zeros_like(keys)
    for part in blocks(query.shape[2], query.shape[:2].numel() * key.shape[2]):
        weights = weights_of(row_logits(wide, keys, rule, part), lse[:, :, part])
        if real is not None:
            weights = weights.masked_fill(~real[:, None, part, None], 0.0)
        change = weights * of_mass[:, :, None]
        of_lse[:, :, part] = -change.sum(-1)
        change = change.unflatten(1, (groups, heads // groups)) * scaling
        of_query[:, :, part] = (change @ keys[:, :, None]).flatten(1, 2)
        queries = wide[:, :, part].unflatten(1, (groups, heads // groups))
        of_key += (change.mT @ queries).sum(2)
    return of_query.to(query.dtype), of_key.to(key.dtype), of_lse


@torch.library.custom_op(add_op_namespace_prefix("key_counts"), mutates_args=())
def key_counts_op(
    like: torch.Tensor,
    queries: int,
    keys: int,
    real: torch.Tensor | None,
    mask: torch.Tensor | None,
    first: torch.Tensor | None,
    last: torch.Tensor | None,
    causal: bool,
    offset: int,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(B, Tk)` int32, int32 and bool: `KeyCounts`; `like` is any tensor of the device."""
    from . import column_mass_triton

    batch = _batch(mask, real)
    key_mask = KeyMask(mask, first, last, causal, offset, window)
    return column_mass_triton.key_counts(queries, keys, batch, real, key_mask, like.device)


def _batch(mask: torch.Tensor | None, real: torch.Tensor | None) -> int:
    sizes = [tensor.shape[0] for tensor in (mask, real) if tensor is not None]
    return max(sizes, default=1)


def _rule(scaling: float, mask: torch.Tensor | None, causal: bool, offset: int, window: int) -> AttentionRule:
    """The rule that a `KeyMask` says the same as."""
    if mask is None:
        return AttentionRule(scaling, causal=causal, offset=offset, window=window or None)
    if mask.shape[1] == 1:
        return AttentionRule(scaling, mask=mask[:, 0], causal=causal, offset=offset)
    return AttentionRule(scaling, mask=mask[:, None])


@column_mass_op.register_fake
def _(query: torch.Tensor, key: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty(*query.shape[:2], key.shape[2], dtype=torch.float32)


@column_mass_backward.register_fake
def _(query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(lse)


@key_counts_op.register_fake
def _(
    like: torch.Tensor, queries: int, keys: int, real: torch.Tensor | None, mask: torch.Tensor | None, *_: Any
) -> tuple[torch.Tensor, ...]:
    batch = _batch(mask, real)
    seeing, longest = (like.new_empty(batch, keys, dtype=torch.int32) for _ in range(2))
    return seeing, longest, like.new_empty(batch, keys, dtype=torch.bool)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    query, key, lse, real, ctx.scaling, mask, _first, _last, *ctx.rest = inputs
    ctx.save_for_backward(query, key, lse, real, mask)


def _gradient(ctx: Any, of_mass: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    query, key, lse, real, mask = ctx.saved_tensors
    gradients = column_mass_backward(query, key, lse, real, of_mass, ctx.scaling, mask, *ctx.rest)
    return *gradients, *[None] * 8


column_mass_op.register_autograd(_gradient, setup_context=_keep)
