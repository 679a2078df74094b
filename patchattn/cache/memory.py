"""What a kv cache takes up."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import Cache, EncoderDecoderCache

from .branch_tokens import BranchTokens
from .tracked import TrackedLayer


def held_bytes(held: Any) -> int:
    """Memory of a kv cache, or of one of its layers, in bytes: with spare places and all that follows its sequences.

    What several tensors share counts once, and a tensor that is a part of a larger one as the larger one, which is what
    stays allocated.
    """
    caches = (
        (held.self_attention_cache, held.cross_attention_cache) if isinstance(held, EncoderDecoderCache) else (held,)
    )
    layers = [layer for each in caches for layer in (each.layers if isinstance(each, Cache) else [each])]
    tensors = [
        tensor
        for layer in layers
        for tensor in (layer.held() if isinstance(layer, TrackedLayer) else vars(layer).values())
        if isinstance(tensor, torch.Tensor)
    ]
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


@dataclass(frozen=True)
class LayerMemory:
    """What one layer of a kv cache takes up.

    Attributes:
        stored_bytes: all that is allocated for it: keys, values, spare places, and what follows its sequences.
        dense_bytes: keys and values of all tokens that it was given, and nothing else.
    """

    stored_bytes: int
    dense_bytes: int


@dataclass(frozen=True, repr=False)
class CacheReport:
    """What a kv cache takes up, and what it would if it kept everything.

    Attributes:
        layers: the model's own, one by one.
        branch_bytes: all that is held for each branch of a decoding variant, which has layers of its own, also where it
            forks.
    """

    layers: list[LayerMemory]
    branch_bytes: list[int]

    @property
    def stored_bytes(self) -> int:
        """Of all layers, those of branches included."""
        return sum(layer.stored_bytes for layer in self.layers) + sum(self.branch_bytes)

    @property
    def dense_bytes(self) -> int:
        """Of all layers of the model's own."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def ratio(self) -> float | None:
        """Bytes stored for each byte that a cache of everything would take; `None` of an empty one."""
        return self.stored_bytes / self.dense_bytes if self.dense_bytes else None

    def __repr__(self) -> str:
        ratio = "" if self.ratio is None else f", {self.ratio:.3f} of it"
        branches = f", {sum(self.branch_bytes)} of them for branches" if self.branch_bytes else ""
        return (
            f"CacheReport({len(self.layers)} layers: {self.stored_bytes} bytes stored{branches}, "
            f"{self.dense_bytes} without forgetting{ratio})"
        )


def cache_report(cache: Cache) -> CacheReport:
    """What each layer of a kv cache takes up, read off its tensors.

    Args:
        cache: as `generate` returns it; of an encoder-decoder the part of the decoder's own sequence.

    Raises:
        TypeError: it is not a kv cache.

    Examples:
        >>> import torch
        >>> from patchattn import patch_model
        >>> from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        ...     num_attention_heads=4, vocab_size=64))
        >>> model = patch_model(model, "streaming_llm", sinks=4, recent=56, slack=0)
        >>> cache = DynamicCache()
        >>> _ = model(torch.arange(640)[None] % 64, past_key_values=cache)
        >>> cache_report(cache)
        CacheReport(2 layers: 31200 bytes stored, 327680 without forgetting, 0.095 of it)
    """
    if not isinstance(cache, Cache):
        raise TypeError(f"cache_report expects a kv cache, got {type(cache).__name__}.")
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    starts = [index for index, layer in enumerate(own.layers) if isinstance(layer, BranchTokens)]
    parts = [own.layers[first:last] for first, last in pairwise([0, *starts, len(own.layers)])]
    return CacheReport(
        [LayerMemory(held_bytes(layer), _dense_bytes(layer)) for layer in parts[0]],
        [sum(map(held_bytes, branch)) for branch in parts[1:]],
    )


def _dense_bytes(layer: Any) -> int:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor) or keys.dim() != 4:
        return 0
    token = sum(each.element_size() * each.shape[0] * each.shape[1] * each.shape[3] for each in (keys, values))
    apart = _dense_bytes(layer.apart[1]) if isinstance(layer, TrackedLayer) and layer.apart is not None else 0
    return int(layer.get_seq_length()) * token + apart
