"""What enters a kv cache: variants that scale keys or values must do so before they are stored.

The same stand-in tells which layer of the cache a module writes to, where a variant keeps state there (`caching.py`).

The seam sees keys and values after the cache. So the cache that a patched module is called with is replaced, for that
call, by one that lets the variants change new entries and then hands everything on to the real one. That point comes
after the projection, its norm and the rotary embedding, and is the same in every family, fused projections included.
"""

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from transformers import Cache, EncoderDecoderCache

from .masks import packed_sequences, visible_keys

if TYPE_CHECKING:
    from .call import LayerContext
    from .seam import VariantChain


class CacheTap:
    """Changes keys and values of one call of one attention module on their way into its cache; sees where they go."""

    def __init__(self, context: "LayerContext", chain: "VariantChain") -> None:
        self.context = context
        self.chain = chain
        self.is_used = False  # new entries have passed
        self.layer: Any = None  # where they went
        self.added = 0  # how many they were, in tokens

    def covers(self, key: torch.Tensor) -> bool:
        """Whether the keys that attention is called with came through the cache, in this call or an earlier one."""
        return self.is_used or self.holder(key) is not None

    def holder(self, key: torch.Tensor) -> Any:
        """The cache layer whose keys these are, or `None`."""
        cache: Any = self.context.cache
        halves = (cache.self_attention_cache, cache.cross_attention_cache) if _is_pair(cache) else (cache,)
        layers = (layer for half in halves for layer in half.layers)
        return next((layer for layer in layers if getattr(layer, "keys", None) is key), None)

    def change(
        self, key: torch.Tensor, value: torch.Tensor, cache: Cache, layer_index: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """New keys and values, changed by the variants."""
        self.is_used = True
        site, module = self.chain.site, self.context.module
        rows, mask = key.shape[2], self.context.attention_mask
        batch, length = self.context.layer_input.shape[:2]
        visible = visible_keys(
            mask,
            sequence=packed_sequences(mask, self.chain.base, self.context.arguments, batch, length),
            q_length=length,
            kv_length=rows if site.is_cross else cache.get_mask_sizes(rows, layer_index)[0],
            is_causal=bool(getattr(module, "is_causal", True)) and not site.is_cross,
            base=self.chain.base,
            window=_window(module),
            device=key.device,
        )
        return self.chain.before_cache(key, value, self.context, visible)


def _window(module: Any) -> int | None:
    """The sliding window of a module: its own where the model's layers differ, else the configuration's."""
    if not getattr(module, "is_sliding", True):
        return None
    window: int | None = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
    return window


class TappedCache(Cache):
    """A cache seen through a tap."""

    def __init__(self, cache: Cache, tap: CacheTap) -> None:
        self._cache = cache
        self._tap = tap

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._tap.chain.storing:
            key_states, value_states = self._tap.change(key_states, value_states, self._cache, layer_idx)
        held = self._cache.update(key_states, value_states, layer_idx, *args, **kwargs)
        self._tap.layer, self._tap.added = self._cache.layers[layer_idx], key_states.shape[2]
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


def _is_pair(cache: Any) -> TypeGuard[EncoderDecoderCache]:
    return isinstance(cache, EncoderDecoderCache)


def tap_cache(cache: Cache, tap: CacheTap) -> Cache:
    """The cache to call the module with in place of `cache`."""
    if _is_pair(cache):
        return TappedEncoderDecoderCache(cache, tap)
    return TappedCache(cache, tap)
