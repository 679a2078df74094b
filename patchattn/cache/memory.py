"""What a kv cache takes up."""

from typing import Any

import torch
from transformers import Cache, EncoderDecoderCache

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
