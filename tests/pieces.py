"""Pieces of a text, each encoded by the plain model alone, whose keys and values are then put together."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from patchattn.core.kv_caches import cache_argument

Stored = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values `(1, Hkv, T, D)` of every layer


def encoded(
    model: nn.Module, ids: torch.Tensor, first: int, past: Sequence[Stored] = ()
) -> tuple[torch.Tensor, Stored]:
    """Logits `(T, V)` of tokens `(T,)` at positions from `first` on, behind others; and their own keys and values."""
    cache = DynamicCache()
    for layer, parts in enumerate(zip(*past, strict=True)):
        cache.update(*(torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True)), layer)
    held = cache.get_seq_length()
    with torch.no_grad():
        logits = model(
            ids[None],
            attention_mask=torch.ones(1, held + len(ids), dtype=torch.long),
            position_ids=torch.arange(first, first + len(ids))[None],
            **cache_argument(model, cache),
        ).logits[0]
    return logits, [(layer.keys[:, :, held:], layer.values[:, :, held:]) for layer in cache.layers]


def moved(model: Any, stored: Stored, shift: int) -> Stored:
    """The same with keys of a Llama turned by so many positions, in float64."""
    dim = stored[0][0].shape[-1]
    theta = model.config.rope_parameters["rope_theta"]
    angles = shift / theta ** (2 * torch.arange(dim // 2, dtype=torch.float64) / dim)
    cos, sin = angles.cos(), angles.sin()
    turned = []
    for key, value in stored:
        one, other = key[..., : dim // 2], key[..., dim // 2 :]
        turned.append((torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1), value))
    return turned
