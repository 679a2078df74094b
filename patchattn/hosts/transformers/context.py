"""The hook of a patched attention module: what it is called with, and a tap on its kv cache."""

from typing import Any

import torch
from torch import nn
from transformers import Cache

from ...core.context import begin_context, close_context, current_context
from ...core.hooks import refuse_later_hooks
from ...core.probe import chain_on
from ...core.ranks import NOTHING_TOLD
from ...core.run import run_of
from ...core.shards import added, own_tensor
from ...core.surroundings import LayerContext
from ...core.tap import CacheTap, tap_cache
from .bases import base_in_force
from .paged import holds_pages, refuse_chain
from .sites import INLINE


def open_context(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pre-hook of a patched module: note what it is called with, and tap its cache where a variant needs that."""
    chain: Any = chain_on(module)  # or PEFT's wrapper around one, which passes attributes on
    if not torch.compiler.is_compiling():
        refuse_later_hooks(module)
    site = chain.site
    values = {**dict(zip(site.arguments, args, strict=False)), **kwargs} if args else kwargs
    if holds_pages(values):
        refuse_chain(chain)
    run = run_of(values)
    if chain.base != INLINE:  # whose code asks its own configuration, in every call
        base_in_force(module, chain.base, run)
    cache_argument = cache = None
    for name, value in values.items():
        if isinstance(value, Cache):
            cache_argument, cache = name, value
            break
    layer_input = values[site.input_argument]
    memory = values.get(site.memory_argument) if site.memory_argument else None
    if site.is_part:  # of what each process makes of them for its heads
        is_own, like = memory is layer_input, own_tensor(module)
        layer_input = added(layer_input, like)
        memory = layer_input if is_own else memory if memory is None else added(memory, like)
    context = LayerContext(
        module=module,
        layer_input=layer_input,
        memory=memory,
        attention_mask=values.get(site.mask_argument) if site.mask_argument else None,
        arguments=values,
        cache=cache,
        told=run.told[-1] if run.told else NOTHING_TOLD,
    )
    begin_context(context)
    if cache is None or cache_argument is None or not chain.taps_cache:
        return None
    context.tap = CacheTap(context, chain)
    tapped = tap_cache(cache, context.tap)
    if cache_argument in kwargs:
        return args, {**kwargs, cache_argument: tapped}
    position = site.arguments.index(cache_argument)
    return (*args[:position], tapped, *args[position + 1 :]), kwargs


def close_proving(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Post-hook of a patched module whose code asks for the implementation by name; called also where it failed.

    Raises:
        NotImplementedError: it has taken a branch that calls no attention function, so that no variant ran.
    """
    attended = current_context(module).attended
    close_context(module, args, output)
    if output is not None and not attended:
        chain: Any = chain_on(module)
        raise NotImplementedError(
            f"{chain.site.module_class} ({chain.site.name}) asks for the implementation by name, and under "
            f"{chain.base!r} calls no attention function that could be patched. Load the model with another "
            "attn_implementation."
        )
