"""Attention to selected pages of keys, as methods that select from a kv cache decode with (Quest, arXiv 2406.10774)."""

from typing import Any, cast

import torch

from .backend import triton_runs
from .key_mask import key_mask, unsupported
from .namespace import add_op_namespace_prefix
from .rows import (
    AttentionRule,
    are_few,
    empty_attention,
    full_precision,
    is_empty,
    log_sum_exp,
    weights_of,
    with_heads,
)
from .selected_attention_cpu import by_whole_pages


def selected_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    counts: torch.Tensor | None,
    page_size: int,
    rule: AttentionRule,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`softmax(q k^T * scaling) v` over the keys of the pages that are listed for each kv head; no other is read.

    Page p holds the keys from `p * page_size` on; the last one may be cut off by the end of the keys. What the rule
    hides stays hidden. With `pages = torch.arange(N)` for all it is dense attention.

    Args:
        query: `(B, H, Tq, D)`; few queries, which all read the same pages: one while generating.
        key: `(B, G, Tk, D)`; H is a multiple of G.
        value: `(B, G, Tk, Dv)`.
        pages: `(B or 1, G or 1, N)` int: numbers of pages, in any order, each at most once; one that has no key gives
            none.
        counts: `(B or 1, G or 1)` int: how many of the N are read, the first ones; `None`: all.
        page_size: keys of a page.
        rule: scaling and visibility.

    Returns:
        `(B, H, Tq, Dv)` in the dtype of `value`, zeros where a query sees nothing; `.transpose(1, 2)` of it is
        contiguous. And the log-sum-exp `(B, H, Tq)`, float32 at least, -inf there. Both have gradients.

    Raises:
        ValueError: shapes do not fit each other, or pages have no keys.
        TypeError: `pages` or `counts` are not integers.
        NotImplementedError: PATCHATTN_KERNELS is `triton`, and the kernel cannot compute the call.
    """
    _check(query, key, value, pages, counts, page_size)
    on_cpu = query.device.type == "cpu" and type(query) is torch.Tensor and not torch.is_grad_enabled()
    # a call of an operation, and what is around it, costs more than to choose the pages of a token
    is_plain = on_cpu and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")
    lacking = unsupported(rule)
    if is_empty(query, key):
        with torch.autocast(query.device.type, enabled=False):
            output, _, lse = empty_attention(query, key, value, rule)
    elif lacking is not None:
        triton_runs(query, lacking=lacking)  # refuses where the kernel is insisted on
        with torch.autocast(query.device.type, enabled=False):
            output, lse = _reference(query, key, value, pages, counts, page_size, rule)
    else:
        operands = (query, key, value)
        if not query.dtype == key.dtype == value.dtype:
            dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
            operands = (query.to(dtype), key.to(dtype), value.to(dtype))
        given = (rule.mask, rule.sequence, float(rule.scaling), rule.causal, rule.offset, rule.window)
        arguments: tuple[Any, ...] = (*operands, pages, counts, page_size, *given)
        if is_plain:
            return _with_dtype(_computed(*arguments), value.dtype)
        with torch.autocast(query.device.type, enabled=False):
            return _with_dtype(_forward(*arguments), value.dtype)
    return _with_dtype((output.transpose(1, 2).contiguous().transpose(1, 2), lse), value.dtype)


def _with_dtype(result: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return result[0].to(dtype), result[1]


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    counts: torch.Tensor | None,
    page_size: int,
) -> None:
    batch, heads, _, dim = query.shape
    groups, keys = key.shape[1], key.shape[2]
    if key.shape != (batch, groups, keys, dim) or value.shape[:3] != key.shape[:3] or heads % groups:
        raise ValueError(
            "Expected query (B, H, Tq, D), key (B, G, Tk, D) and value (B, G, Tk, Dv), H a multiple of G, got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}."
        )
    if pages.dim() != 3 or pages.shape[0] not in (1, batch) or pages.shape[1] not in (1, groups):
        raise ValueError(f"Expected pages ({batch} or 1, {groups} or 1, N), got {tuple(pages.shape)}.")
    _check_integers("pages", pages)
    if counts is not None:
        if counts.dim() != 2 or counts.shape[0] not in (1, batch) or counts.shape[1] not in (1, groups):
            raise ValueError(f"Expected counts ({batch} or 1, {groups} or 1), got {tuple(counts.shape)}.")
        _check_integers("counts", counts)
    if page_size < 1:
        raise ValueError(f"Expected at least one key per page, got a page_size of {page_size}.")


def _check_integers(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"Expected integers as {name}, got {tensor.dtype}.")


def _listed(
    query: torch.Tensor,
    key: torch.Tensor,
    pages: torch.Tensor,
    counts: torch.Tensor | None,
    page_size: int,
    rule: AttentionRule,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Where in `(B, G, Tk)` the N * page_size keys of all pages are, and logits `(B, H, Tq, N * page_size)` of them."""
    batch, heads, rows, _ = query.shape
    groups, keys = key.shape[1], key.shape[2]
    index = torch.arange(pages.shape[-1] * page_size, device=key.device)
    columns = pages.expand(batch, groups, -1).long()[..., index // page_size] * page_size + index % page_size
    listed = (columns >= 0) & (columns < keys)
    if counts is not None:
        listed = listed & (index // page_size < counts.expand(batch, groups)[..., None])
    columns = columns.clamp(0, keys - 1)
    batches, kv_heads = (torch.arange(size, device=key.device) for size in (batch, groups))
    place = (batches[:, None, None], kv_heads[:, None], columns)

    def per_query(of_keys: torch.Tensor) -> torch.Tensor:
        return of_keys.repeat_interleave(heads // groups, dim=1)[:, :, None].expand(-1, -1, rows, -1)

    columns, listed = per_query(columns), per_query(listed)
    logits = (_grouped(query, groups) @ key[place].mT).view(columns.shape) * rule.scaling
    if rule.softcap is not None:
        logits = torch.tanh(logits / rule.softcap) * rule.softcap
    for term in rule.added(slice(0, rows), keys):
        logits = logits + term.expand(batch, heads, rows, keys).gather(-1, columns)
    visible = with_heads(rule.visible(slice(0, rows), (rows, keys), key.device)).expand(batch, heads, rows, keys)
    return place, logits.masked_fill(~(visible.gather(-1, columns) & listed), float("-inf"))


def _grouped(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """`(B, H, Tq, X)` as `(B, G, H / G * Tq, X)`: one product per kv head."""
    return tensor.reshape(tensor.shape[0], groups, -1, tensor.shape[-1])


def _reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    counts: torch.Tensor | None,
    page_size: int,
    rule: AttentionRule,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The listed keys gathered, and the softmax over them: for every rule, differentiable, in full precision."""
    query, key, value = full_precision(query), full_precision(key), full_precision(value)
    place, logits = _listed(query, key, pages, counts, page_size, rule)
    lse = log_sum_exp(logits, rule)
    output = _grouped(weights_of(logits, lse), key.shape[1]) @ value[place]
    return output.view(*query.shape[:3], -1), lse


def _lacking(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> str | None:
    """What of a call Triton's kernel does not compute, of those that come here."""
    if scaling <= 0.0:
        return f"the factor of the logits is {scaling}, not positive"
    if value.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"operands are in {value.dtype}"
    if max(query.shape[-1], value.shape[-1]) > 256:
        return f"heads have {max(query.shape[-1], value.shape[-1])} dimensions, more than 256"
    return None if are_few(query, key) else f"its queries are {query.shape[2]}, too many for one tile"


def _computed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    counts: torch.Tensor | None,
    page_size: int,
    mask: torch.Tensor | None,
    sequence: torch.Tensor | None,
    scaling: float,
    causal: bool,
    offset: int | None,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    rule = AttentionRule(scaling, mask=mask, causal=causal, offset=offset, window=window, sequence=sequence)
    if triton_runs(query, lacking=_lacking(query, key, value, scaling)):
        from .decoding_triton import attend

        seen = key_mask(rule, query.shape[2], key.shape[2], query.device)
        if counts is None:
            counts = torch.full(pages.shape[:2], pages.shape[-1], device=pages.device)
        how: dict[str, Any] = {"pages": pages.int(), "counts": counts.int(), "page": page_size, "dtype": value.dtype}
        output, lse = attend(query, key, value, scaling, seen, **how)
        return cast(torch.Tensor, output), lse  # there are values
    if query.device.type == "cpu":
        output, lse = by_whole_pages(query, key, value, pages, counts, page_size, rule)
    else:
        output, lse = _reference(query, key, value, pages, counts, page_size, rule)
    return output.to(value.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse


_forward = torch.library.custom_op(add_op_namespace_prefix("selected_attention"), _computed, mutates_args=())


@torch.library.custom_op(add_op_namespace_prefix("selected_attention_backward"), mutates_args=())
def _backward(
    gradient: torch.Tensor,
    lse_gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    counts: torch.Tensor | None,
    page_size: int,
    mask: torch.Tensor | None,
    sequence: torch.Tensor | None,
    scaling: float,
    causal: bool,
    offset: int | None,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In plain torch: nothing that generates asks for it. Sums of keys are in a fixed order on every device."""
    rule = AttentionRule(scaling, mask=mask, causal=causal, offset=offset, window=window, sequence=sequence)
    dtype, groups = query.dtype, key.shape[1]
    query, key, value = full_precision(query), full_precision(key), full_precision(value)
    upstream = _grouped(full_precision(gradient), groups)
    place, logits = _listed(query, key, pages, counts, page_size, rule)
    weights = _grouped(weights_of(logits, log_sum_exp(logits, rule)), groups)
    change = upstream @ value[place].mT
    change = change - (change * weights).sum(-1, keepdim=True) + _grouped(lse_gradient[..., None], groups)
    change = change * weights * scaling
    of_key = torch.zeros_like(key).index_put_(place, change.mT @ _grouped(query, groups), accumulate=True)
    of_value = torch.zeros_like(value).index_put_(place, weights.mT @ upstream, accumulate=True)
    of_query = (change @ key[place]).view(query.shape)
    return of_query.to(dtype).contiguous(), of_key.to(dtype).contiguous(), of_value.to(dtype).contiguous()


@_forward.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, rows, _dim = query.shape
    lse = query.new_empty(batch, heads, rows, dtype=torch.promote_types(query.dtype, torch.float32))
    return value.new_empty(batch, rows, heads, value.shape[-1]).transpose(1, 2), lse


@_backward.register_fake
def _(
    gradient: torch.Tensor,
    lse_gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, pages, counts, ctx.page_size, mask, sequence, *ctx.numbers = inputs
    ctx.save_for_backward(query, key, value, pages, counts, mask, sequence)


def _gradients(ctx: Any, gradient: torch.Tensor, lse_gradient: torch.Tensor) -> tuple[Any, ...]:
    query, key, value, pages, counts, mask, sequence = ctx.saved_tensors
    operands = (query, key, value, pages, counts, ctx.page_size, mask, sequence, *ctx.numbers)
    return (*_backward(gradient, lse_gradient, *operands), *([None] * 9))


_forward.register_autograd(_gradients, setup_context=_save)
