"""Calls made of a call: of some of its keys, of one of its queries; and a call in the terms of the kernels."""

from dataclasses import replace
from typing import Any

import torch

from patchattn_kernels import AttentionRule

from .keeping import of_query_heads
from .places import Places, gathered, of_places, taken

# In what follows `call` is a `core.call.AttentionCall`, which is made with the help of this module.


def of_keys(call: Any, places: Places) -> Any:
    """As `AttentionCall.at`."""
    call = call if places.of_heads is None else call.seeing(places.of_heads)
    places = places.of_keys(call.key.shape[2])
    index, kwargs = places.index, call.kwargs
    mask = call.mask.at(index, has_empty=places.has_empty)
    bias = kwargs.get("position_bias")
    if bias is not None:
        heads = of_query_heads(index, call.query.shape[1])[:, :, None]
        kwargs = {**kwargs, "position_bias": gathered(bias, heads)}
    return call.replace(
        key=taken(call.key, index),
        value=taken(call.value, index),
        mask=mask,
        facts={name: of_places(fact, index) for name, fact in call.facts.items()},
        kwargs=kwargs,
        context=replace(call.context, of_some_keys=True),
    )


def of_row(call: Any, i: int) -> Any:
    """As `AttentionCall.row`."""
    rows = torch.tensor([i], device=call.query.device)
    kwargs, count = dict(call.kwargs), call.query.shape[2]
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = kwargs["position_bias"].expand(-1, -1, count, -1)[:, :, i : i + 1]
    positions = kwargs.get("position_ids")
    if positions is not None and positions.shape[-1] == count:
        kwargs["position_ids"] = positions[..., i : i + 1]
    query, mask = call.query[:, :, i : i + 1], call.mask.of_rows(rows)
    return call.replace(query=query, mask=mask, kwargs=kwargs, context=call.context.of_rows(rows))


def rule_of(call: Any, heads: torch.Tensor | None) -> AttentionRule:
    """As `AttentionCall.rule`."""
    mask = call.mask if heads is None else call.mask.of_heads(heads)
    bias, sinks = call.kwargs.get("position_bias"), call.kwargs.get("s_aux")
    if bias is not None:
        bias = bias[..., : mask.keys].expand(-1, -1, mask.queries, -1)
        bias = bias if heads is None or bias.shape[1] == 1 else bias[:, heads]
    sinks = sinks if sinks is None or heads is None else sinks[heads]
    return mask.rule(call.scaling, softcap=call.kwargs.get("softcap"), bias=bias, sinks=sinks)
