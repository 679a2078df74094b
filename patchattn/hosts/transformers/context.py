"""Hooks of a patched attention module: what it is called with, kept from the start of the call to its end."""

import sys
import threading
from typing import Any

import torch
from torch import nn
from transformers import Cache

from ...core.hooks import refuse_later_hooks
from ...core.packing import CHILD
from ...core.surroundings import LayerContext
from ...core.tap import CacheTap, tap_cache
from .bases import base_in_force
from .batching import refuse_paged

_local = threading.local()  # .context: the attention module now running in this thread


def current_context(module: nn.Module) -> LayerContext:
    """What the attention module that now runs in this thread was called with.

    Raises:
        RuntimeError: it was not called as a module, or before its hooks were there.
    """
    context = getattr(_local, "context", None)
    if context is None or context.module is not module:
        if _is_called(module):
            raise RuntimeError(
                f"The model was patched, in another thread, while this one ran it: {type(module).__name__} was called "
                "before its hooks were there. Patch and unpatch when no forward runs, and start that one anew."
            )
        raise RuntimeError(
            f"{type(module).__name__} was not called as a module, so that its hooks did not run; a patched attention "
            "module must be called, not its forward method."
        )
    return context


def _is_called(module: nn.Module) -> bool:
    """Whether the module, and not just its forward method, is being called in this thread."""
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        frame = caller
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals["self"] is module:
            return True
    return False


def open_context(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pre-hook of a patched module: note what it is called with, and tap its cache where a variant needs that."""
    chain: Any = module._modules[CHILD]  # or PEFT's wrapper around one, which passes attributes on
    if not torch.compiler.is_compiling():
        refuse_later_hooks(module)
    site = chain.site
    values = {**dict(zip(site.arguments, args, strict=False)), **kwargs}
    refuse_paged(values)
    base_in_force(module, chain.base)
    cache_argument, cache = next(((name, v) for name, v in values.items() if isinstance(v, Cache)), (None, None))
    context = LayerContext(
        module=module,
        layer_input=values[site.input_argument],
        memory=values.get(site.memory_argument) if site.memory_argument else None,
        attention_mask=values.get(site.mask_argument) if site.mask_argument else None,
        arguments=values,
        cache=cache,
    )
    _local.context = context
    if cache is None or cache_argument is None or not chain.taps_cache:
        return None
    context.tap = CacheTap(context, chain)
    tapped = tap_cache(cache, context.tap)
    if cache_argument in kwargs:
        return args, {**kwargs, cache_argument: tapped}
    position = site.arguments.index(cache_argument)
    return (*args[:position], tapped, *args[position + 1 :]), kwargs


def close_context(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Post-hook of a patched module, called also where it failed: let go of the tensors."""
    context: LayerContext | None = getattr(_local, "context", None)
    _local.context = None
    if context is not None and context.tap is not None:
        context.tap.close()


def note_raw_query(norm: nn.Module, args: tuple[Any, ...]) -> None:
    """Pre-hook of a query norm: keep what it is about to normalise."""
    context = getattr(_local, "context", None)
    if context is not None:
        context.raw_query = args[0]
