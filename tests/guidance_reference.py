"""Attention raised at some keys in some rows, written out over whole attention matrices in float64."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from . import vlms


@contextmanager
def raised(
    model: nn.Module, boosts: Sequence[Sequence[float]], rows: Sequence[Sequence[int]], layers: Sequence[int]
) -> Iterator[nn.Module]:
    """The unpatched model, in some layers of whose language model logits are `s + a |s|` in some rows.

    Args:
        model: unpatched, in float64.
        boosts: of every sequence, a of each key.
        rows: of every sequence, the rows.
        layers: their numbers.
    """

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        logits = (query @ key.mT * kwargs["scaling"]).numpy()
        seen = np.ones_like(logits, dtype=bool)
        if attention_mask is not None:
            seen &= np.broadcast_to(attention_mask.numpy() > -1e30, logits.shape)
        out = np.zeros((*logits.shape[:3], value.shape[-1]))
        for b, h, i in np.ndindex(*logits.shape[:3]):
            keys = np.flatnonzero(seen[b, h, i])
            if not len(keys):
                continue
            row = logits[b, h, i, keys]
            if getattr(module, "raised_here", False) and i in rows[b]:
                row = row + np.array([boosts[b][j] for j in keys]) * np.abs(row)
            weights = np.exp(row - row.max())
            out[b, h, i] = weights / weights.sum() @ value[b, h, keys].numpy()
        return torch.from_numpy(out).transpose(1, 2), None

    AttentionInterface.register("raised", attend)
    AttentionMaskInterface.register("raised", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    twin: Any = copy.deepcopy(model)
    twin.set_attn_implementation("raised")
    for number in layers:
        twin.get_decoder().layers[number].self_attn.raised_here = True
    try:
        yield twin
    finally:
        AttentionInterface._global_mapping.pop("raised")
        AttentionMaskInterface._global_mapping.pop("raised")


@torch.no_grad()
def text_alone(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """`(V,)` logits behind one sequence `(1, T)` without its image tokens."""
    return model(input_ids=ids[ids != vlms.IMAGE][None]).logits[0, -1]


def guided(logits: torch.Tensor, without: torch.Tensor, gamma: float, beta: float) -> torch.Tensor:
    """`gamma (log p - log q) + log q` where `log p >= max log p + ln beta`, up to a constant; number by number."""
    p, q = logits.double().log_softmax(-1), without.double().log_softmax(-1)
    least = float(p.max()) + (float(np.log(beta)) if beta else -np.inf)
    found = [gamma * (a - b) + b if a >= least else -torch.inf for a, b in zip(p.tolist(), q.tolist(), strict=True)]
    return torch.tensor(found, dtype=torch.float64)
