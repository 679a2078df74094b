"""What enters a kv cache: variants that scale keys or values must do so before they are stored.

The same stand-in tells which layer of the cache a module writes to, where a variant keeps state there (`caching.py`).

The seam sees keys and values after the cache. So the cache that a patched module is called with is replaced, for that
call, by one that lets the variants change new entries and then hands everything on to the real one. That point comes
after the projection, its norm and the rotary embedding, and is the same in every family, fused projections included.
"""

from collections import UserDict
from collections.abc import Iterator
from typing import Any, Protocol, TypeGuard

import torch
from torch.overrides import TorchFunctionMode
from transformers import Cache, EncoderDecoderCache

from .mask import Mask
from .sites import AttentionSite
from .surroundings import LayerContext

# Functions of torch that bring a tensor into another shape, place or type, and compute nothing from it.
_MOVES = frozenset(
    [
        "__get__",
        "__getitem__",
        "chunk",
        "clone",
        "contiguous",
        "detach",
        "expand",
        "expand_as",
        "flatten",
        "float",
        "narrow",
        "pad",
        "permute",
        "repeat",
        "repeat_interleave",
        "reshape",
        "select",
        "split",
        "squeeze",
        "to",
        "transpose",
        "type",
        "type_as",
        "unbind",
        "unflatten",
        "unsqueeze",
        "view",
    ]
)


class StoredStates(TorchFunctionMode):
    """Follows keys and values from the cache that returned them to the attention function.

    Variants change keys and values on their way into the cache. What attention gets must then be just that, and nothing
    else may be computed from it: multi-head latent attention stores what keys are made of only afterwards, and some
    models make masks of their values.
    """

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        super().__init__()
        self.streams = {id(key): ("key", key), id(value): ("value", value)}  # tensors kept, so that no id comes again
        self.computed: str | None = None  # what else was made of them

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        streams = {self.streams[id(t)][0] for t in _tensors((args, kwargs)) if id(t) in self.streams}
        results = list(_tensors(result))
        if len(streams) == 1 and func.__name__ in _MOVES:
            stream = streams.pop()
            self.streams.update((id(t), (stream, t)) for t in results)
        elif streams and results:  # asking for a shape gives no tensor
            self.computed = func.__name__
        return result

    def fault(self, key: torch.Tensor, value: torch.Tensor) -> str | None:
        """Why what attention is called with is not what was stored; `None` if it is."""
        if self.computed is not None:
            return f"computes on the keys and values that its kv cache returns ({self.computed})"
        found = [self.streams.get(id(t), (None,))[0] for t in (key, value)]
        return None if found == ["key", "value"] else "attends over other keys and values than its kv cache returns"


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


class Storing(Protocol):
    """What a tap asks of the variants of an attention module."""

    site: AttentionSite
    storing: tuple[str, ...]  # those that change what is stored
    stores_what_it_attends: bool

    def mask_before_cache(self, context: LayerContext, key: torch.Tensor, keys: int, own: int | None) -> Mask: ...

    def before_cache(
        self, key: torch.Tensor, value: torch.Tensor, context: LayerContext, mask: Mask
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class CacheTap:
    """Changes keys and values of one call of one attention module on their way into its cache; sees where they go."""

    def __init__(self, context: LayerContext, chain: Storing) -> None:
        self.context: LayerContext | None = context
        self.chain = chain
        self.is_used = False  # new entries have passed
        self.layer: Any = None  # where they went
        self.added = 0  # how many they were, in tokens
        self.returned: torch.Tensor | None = None  # keys, by the cache
        self.follower: StoredStates | None = None

    def follow(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Watch what becomes of the tensors that a cache returned; in one call, for it follows from a module's code."""
        self.returned = key
        if not self.chain.stores_what_it_attends and self.follower is None and not torch.compiler.is_compiling():
            self.follower = StoredStates(key, value)
            self.follower.__enter__()

    def fault(self, key: torch.Tensor, value: torch.Tensor) -> str | None:
        """Why what attention is called with is not what was stored; `None` if it is. Ends the watch."""
        follower = self._stop_following()
        if follower is not None:
            fault = follower.fault(key, value)
            self.chain.stores_what_it_attends = fault is None
            return fault
        if not self.chain.stores_what_it_attends and torch.compiler.is_compiling() and self.returned is not key:
            return "attends over other keys than its kv cache returns, in a call that was compiled before any was not"
        return None

    def _stop_following(self) -> StoredStates | None:
        follower, self.follower = self.follower, None
        if follower is not None:
            follower.__exit__(None, None, None)
        return follower

    def close(self) -> None:
        """The module's call is over. Without its context, the tap is in no reference cycle that keeps the cache."""
        if self.follower is not None:
            self._stop_following()
        self.context = self.returned = None

    def running_context(self) -> LayerContext:
        """The context of the call, while it lasts."""
        if self.context is None:
            raise RuntimeError("The cache of an attention module's call was used after that call.")
        return self.context

    def covers(self, key: torch.Tensor) -> bool:
        """Whether the keys that attention is called with came through the cache, in this call or an earlier one."""
        return self.is_used or self.holder(key) is not None

    def holder(self, key: torch.Tensor) -> Any:
        """The cache layer whose keys these are, or `None`."""
        cache: Any = self.running_context().cache
        halves = (cache.self_attention_cache, cache.cross_attention_cache) if _is_pair(cache) else (cache,)
        layers = (layer for half in halves for layer in half.layers)
        return next((layer for layer in layers if getattr(layer, "keys", None) is key), None)

    def change(
        self, key: torch.Tensor, value: torch.Tensor, cache: Cache, layer_index: int, layer: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """New keys and values, changed by the variants."""
        self.is_used = True
        context = self.running_context()
        rows = key.shape[2]
        if self.chain.site.is_cross:
            keys, own = rows, None
        else:
            keys = cache.get_mask_sizes(rows, layer_index)[0]
            own = keys - rows if getattr(layer, "grows", False) else None
        return self.chain.before_cache(key, value, context, self.chain.mask_before_cache(context, key, keys, own))


class TappedCache(Cache):
    """A cache seen through a tap."""

    def __init__(self, cache: Cache, tap: CacheTap) -> None:
        self._cache = cache
        self._tap = tap

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cache, tap = self._cache, self._tap
        layer: Any = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
        if tap.chain.storing:
            key_states, value_states = tap.change(key_states, value_states, cache, layer_idx, layer)
        if hasattr(layer, "is_expected"):  # it is tracked
            layer.is_expected = True  # the call to come is one of a model that asks for `columns`
        held = cache.update(key_states, value_states, layer_idx, *args, **kwargs)
        tap.layer, tap.added = cache.layers[layer_idx], key_states.shape[2]
        if tap.chain.storing:
            tap.follow(*held)
        return held

    @property
    def layers(self) -> Any:
        return self._cache.layers

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_cache"], name)


class TappedEncoderDecoderCache(EncoderDecoderCache):
    """Both halves of an encoder-decoder cache seen through a tap; only the one the module writes to is touched."""

    def __init__(self, cache: EncoderDecoderCache, tap: CacheTap) -> None:
        self._cache = cache
        self.self_attention_cache = TappedCache(cache.self_attention_cache, tap)
        self.cross_attention_cache = TappedCache(cache.cross_attention_cache, tap)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_cache"], name)


def is_shared(key: torch.Tensor, context: LayerContext) -> bool:
    """Whether a module hands its keys to another layer, or has them from one, in a dictionary it is called with."""
    places = [value for value in context.arguments.values() if isinstance(value, dict | UserDict)]
    return any(tensor is key for place in places for tensor in _tensors(tuple(place.values())))


def _is_pair(cache: Any) -> TypeGuard[EncoderDecoderCache]:
    return isinstance(cache, EncoderDecoderCache)


def tap_cache(cache: Cache, tap: CacheTap) -> Cache:
    """The cache to call the module with in place of `cache`."""
    if _is_pair(cache):
        return TappedEncoderDecoderCache(cache, tap)
    return TappedCache(cache, tap)
