"""kv caches among what models take and give: told by their type, since releases of transformers rename them."""

import dataclasses
import inspect
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..cache.tracked import TrackedLayer, track, tracked
from .selection import base_model
from .sites import AttentionSite

_TYPE = re.compile(r"\b(EncoderDecoder)?Cache\b")
# What this release of transformers calls them.
_NAME = next(field.name for field in dataclasses.fields(CausalLMOutputWithPast) if _TYPE.search(str(field.type)))


def find_cache(values: Iterable[Any]) -> Cache | None:
    """The kv cache among the arguments of a call, or among the values that a model gives."""
    return next((value for value in values if isinstance(value, Cache)), None)


def append_in_place(values: Iterable[Any]) -> None:
    """Have the layers that grow, of a kv cache among the arguments of a model's call, do so without copying what they
    hold."""
    cache = None if torch.compiler.is_compiling() else find_cache(values)
    for layer in () if cache is None else _own_half(cache).layers:
        plain: Any = type(layer)
        if TrackedLayer not in plain.__mro__ and issubclass(plain, CacheLayerMixin) and tracked(plain).grows:
            track(layer)


def stored_heads(cache: Cache, site: AttentionSite) -> int | None:
    """How many kv heads the layer of a cache holds that an attention module writes to; `None` where it is empty."""
    if isinstance(cache, EncoderDecoderCache) and site.is_cross:
        cache = cache.cross_attention_cache
    cache = _own_half(cache)
    if site.layer_index >= len(cache.layers):
        return None
    keys = getattr(cache.layers[site.layer_index], "keys", None)
    return keys.shape[1] if isinstance(keys, torch.Tensor) and keys.dim() == 4 else None


def _own_half(cache: Cache) -> Cache:
    """What self-attention writes to."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def takes_cache(model: nn.Module) -> bool:
    """Whether a model, or the one in a wrapper, takes a kv cache."""
    return _cache_name(base_model(model)) is not None


def cache_argument(model: nn.Module, cache: Cache | None) -> dict[str, Cache | None]:
    """A kv cache as the keyword argument that a model takes it by.

    Args:
        model: a transformers model, or a wrapper around one.
        cache: `None` for none yet.

    Raises:
        NotImplementedError: the model takes none.
    """
    base = base_model(model)
    name = _cache_name(base)
    if name is None:
        raise NotImplementedError(f"{type(base).__name__} takes no kv cache.")
    return {name: cache}


def _cache_name(base: nn.Module) -> str | None:
    parameters = inspect.signature(base.forward).parameters
    names = [_NAME, *(name for name, each in parameters.items() if _TYPE.search(str(each.annotation)))]
    return next((name for name in names if name in parameters), None)
