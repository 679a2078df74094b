"""Triton's kernels of `split_attention` as operators of torch, with their gradients."""

from typing import Any, cast

import torch

from .key_mask import KeyMask
from .namespace import add_op_namespace_prefix

Gradients = tuple[torch.Tensor | None, ...]


@torch.library.custom_op(add_op_namespace_prefix("attention"), mutates_args=())
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None,
    first: torch.Tensor | None,
    last: torch.Tensor | None,
    causal: bool,
    offset: int,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention `(B, H, Tq, Dv)` and its log-sum-exp `(B, H, Tq)`, float32; the mask is a `KeyMask`."""
    from . import split_attention_triton

    key_mask = KeyMask(mask, first, last, causal, offset, window)
    output, lse = split_attention_triton.attention(query, key, value, scaling, key_mask)
    output = cast(torch.Tensor, output)  # there are values
    return output, lse


@torch.library.custom_op(add_op_namespace_prefix("log_sum_exp"), mutates_args=())
def log_sum_exp(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None,
    first: torch.Tensor | None,
    last: torch.Tensor | None,
    causal: bool,
    offset: int,
    window: int,
) -> torch.Tensor:
    """`(B, H, Tq)` float32: what `attention` returns beside its output, at half the cost."""
    from . import split_attention_triton

    key_mask = KeyMask(mask, first, last, causal, offset, window)
    return split_attention_triton.attention(query, key, None, scaling, key_mask)[1]


@torch.library.custom_op(add_op_namespace_prefix("key_set_part"), mutates_args=())
def key_set_part(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lse: torch.Tensor,
    key_set: torch.Tensor,
    index: torch.Tensor,
    rank: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None,
    first: torch.Tensor | None,
    last: torch.Tensor | None,
    causal: bool,
    offset: int,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `(B, H, Tq, Dv)` and mass `(B, H, Tq)` of a set of keys, float32; `index` and `rank` as of `compact`."""
    from . import split_attention_triton

    key_mask = KeyMask(mask, first, last, causal, offset, window)
    return split_attention_triton.key_set_part(query, key, value, lse, index, rank, scaling, key_mask)


@torch.library.custom_op(add_op_namespace_prefix("attention_backward"), mutates_args=())
def attention_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    given: torch.Tensor | None,
    lse: torch.Tensor,
    extra: torch.Tensor,
    key_set: torch.Tensor | None,
    index: torch.Tensor | None,
    rank: torch.Tensor | None,
    scaling: float,
    mask: torch.Tensor | None,
    first: torch.Tensor | None,
    last: torch.Tensor | None,
    causal: bool,
    offset: int,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries, keys and values (empty without) of all three: see `split_attention_backward_triton`."""
    from . import split_attention_backward_triton

    chosen = None if key_set is None or index is None or rank is None else (key_set, index, rank)
    key_mask = KeyMask(mask, first, last, causal, offset, window)
    of_query, of_key, of_value = split_attention_backward_triton.attention_backward(
        query, key, value, given, lse, extra, chosen, scaling, key_mask
    )
    return of_query, of_key, query.new_empty(0) if of_value is None else of_value


def compact(key_set: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys of sets, in order and without a look at their number, which would wait for the device.

    Args:
        key_set: `(B, H, Tk)` bool.

    Returns:
        `(B, H or 1, Tk)` int32 each: the keys of a set, followed by those that are not in it; and how many of the set
        there are up to a key, itself included. One list for all heads that share the set's memory.
    """
    if key_set.shape[1] > 1 and key_set.stride(1) == 0:
        key_set = key_set[:, :1]
    rank = key_set.cumsum(-1, dtype=torch.int32)
    number = torch.arange(key_set.shape[-1], dtype=torch.int32, device=key_set.device).expand_as(rank)
    place = torch.where(key_set, rank - 1, rank[..., -1:] + number - rank)
    return torch.empty_like(rank).scatter_(-1, place.long(), number), rank


def _heads_of_a_token_together(batch: int, heads: int, tokens: int, dim: int, like: torch.Tensor, **how: Any) -> Any:
    return like.new_empty(batch, tokens, heads, dim, **how).transpose(1, 2)


@attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, queries, _dim = query.shape
    output = _heads_of_a_token_together(batch, heads, queries, value.shape[-1], query, dtype=torch.float32)
    return output, query.new_empty(batch, heads, queries, dtype=torch.float32)


@log_sum_exp.register_fake
def _(query: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty(query.shape[:3], dtype=torch.float32)


@key_set_part.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, queries, _dim = query.shape
    output = _heads_of_a_token_together(batch, heads, queries, value.shape[-1], query, dtype=torch.float32)
    return output, query.new_empty(batch, heads, queries, dtype=torch.float32)


@attention_backward.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor, ...]:
    def like(tensor: torch.Tensor) -> torch.Tensor:
        batch, heads, tokens, dim = tensor.shape
        return _heads_of_a_token_together(batch, heads, tokens, dim, tensor)

    return like(query), like(key), query.new_empty(0) if value is None else like(value)


def _keep_attention(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    query, key, value, ctx.scaling, mask, first, last, *ctx.rest = inputs
    ctx.save_for_backward(query, key, value, mask, first, last, *output)


def _attention_gradient(ctx: Any, of_output: torch.Tensor, of_lse: torch.Tensor) -> Gradients:
    query, key, value, mask, first, last, output, lse = ctx.saved_tensors
    extra = of_lse - (of_output * output).sum(-1)
    gradients = attention_backward(
        query, key, value, of_output, lse, extra, None, None, None, ctx.scaling, mask, first, last, *ctx.rest
    )
    return *gradients, *[None] * 7


def _keep_log_sum_exp(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    query, key, ctx.scaling, mask, first, last, *ctx.rest = inputs
    ctx.save_for_backward(query, key, mask, first, last, output)


def _log_sum_exp_gradient(ctx: Any, of_lse: torch.Tensor) -> Gradients:
    query, key, mask, first, last, lse = ctx.saved_tensors
    of_query, of_key, _ = attention_backward(
        query, key, None, None, lse, of_lse, None, None, None, ctx.scaling, mask, first, last, *ctx.rest
    )
    return of_query, of_key, *[None] * 7


def _keep_key_set_part(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    query, key, value, lse, key_set, index, rank, ctx.scaling, mask, first, last, *ctx.rest = inputs
    ctx.save_for_backward(query, key, value, lse, key_set, index, rank, mask, first, last, *output)


def _key_set_part_gradient(ctx: Any, of_part: torch.Tensor, of_mass: torch.Tensor) -> Gradients:
    query, key, value, lse, key_set, index, rank, mask, first, last, part, mass = ctx.saved_tensors
    of_lse = -(of_part * part).sum(-1) - of_mass * mass
    gradients = attention_backward(
        query, key, value, of_part, lse, of_mass, key_set, index, rank, ctx.scaling, mask, first, last, *ctx.rest
    )
    return *gradients, of_lse.to(lse.dtype), *[None] * 10


attention.register_autograd(_attention_gradient, setup_context=_keep_attention)
log_sum_exp.register_autograd(_log_sum_exp_gradient, setup_context=_keep_log_sum_exp)
key_set_part.register_autograd(_key_set_part_gradient, setup_context=_keep_key_set_part)
