"""Pieces of a text, each encoded by the plain model alone, whose keys and values are then put together; and calls."""

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


def in_chunks(model: Any, tokens: torch.Tensor, mask: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Logits of calls of these sizes on one cache, rotated by token."""
    cache, parts, done = DynamicCache(), [], 0
    for size in sizes:
        done += size
        given = {"attention_mask": mask[:, :done], **cache_argument(model, cache)}
        places = (mask.cumsum(-1) - 1).clamp(min=0)[:, done - size : done]
        parts.append(model(tokens[:, done - size : done], position_ids=places, **given).logits)
    return torch.cat(parts, dim=1)


def check_second_turn(model: Any, tokens: torch.Tensor, mask: torch.Tensor, **how: Any) -> None:
    """AssertionError if text that goes on behind a cache differs from the same without one."""
    cache = DynamicCache()
    first = model.generate(tokens, attention_mask=mask, **how, **cache_argument(model, cache))
    turn = {"attention_mask": torch.nn.functional.pad(mask, (0, 3), value=1), **how}
    again = model.generate(first, **turn, **cache_argument(model, cache))
    assert torch.equal(again, model.generate(first, **turn))
