"""What an attention module was called with, and what stands between it and its kv cache while it runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import Cache

from .given import key_length, read_mask, real_tokens
from .mask import Mask
from .ranks import NOTHING_TOLD, Told, log_counts


class Tap(Protocol):
    """What stands between an attention module and its kv cache; see `core/tap.py`."""

    is_used: bool  # new entries have passed
    layer: Any  # of the cache, where they went
    added: int  # how many they were, in tokens

    def covers(self, key: torch.Tensor) -> bool:
        """Whether these keys came through the cache, in this call or an earlier one."""

    def fault(self, key: torch.Tensor, value: torch.Tensor) -> str | None:
        """Why what attention is called with is not what was stored; `None` if it is."""

    def close(self) -> None:
        """The module's call is over."""

    def holder(self, key: torch.Tensor) -> Any:
        """The cache layer whose keys these are, or `None`."""


@dataclass(eq=False)
class LayerContext:
    """What an attention module was called with; lives from its start to its end.

    Attributes:
        module: the attention module.
        layer_input: `(B, T, E)` the layer's input, queries are made of it.
        memory: `(B, S, E)` the other sequence of cross attention, or `None`.
        attention_mask: the mask as the module got it.
        arguments: all it was called with, by name.
        cache: the kv cache it writes to, or `None`.
        raw_query: the query before its norm, as the norm got it; `None` in a family without one.
        tap: stands between the module and its cache where a variant changes what is stored.
        rows_done: query rows attended so far, where a module attends in chunks.
        told: what the module that made the mask was told of its tokens.
        mask: of a call whose new keys and values variants change; `None` before they do.
        tape: follows what a module computes that attends in its own code.
        leads_by_sequence: whether the first dimension of its input is known to be that of sequences.
        attended: whether it has called its attention function.
    """

    module: nn.Module
    layer_input: torch.Tensor
    memory: torch.Tensor | None
    attention_mask: Any
    arguments: Mapping[str, Any]
    cache: Cache | None = None
    raw_query: torch.Tensor | None = None
    tap: Tap | None = None
    rows_done: int = 0
    told: Told = NOTHING_TOLD
    mask: Mask | None = None
    tape: Any = None
    leads_by_sequence: bool = True
    attended: bool = False

    def tokens(self, batch: int, rows: int, *, memory: bool = False) -> torch.Tensor:
        """`(B, T, E)` the module's input, row for row that of its queries; or the other sequence, of its keys.

        Raises:
            NotImplementedError: they do not line up.
        """
        given = self.memory if memory else self.layer_input
        aligned = given
        if aligned is not None and aligned.dim() == 2 and batch == 1:  # a packed tower, attended chunk by chunk
            aligned = aligned[None, self.rows_done : self.rows_done + rows]
        if aligned is not None and aligned.dim() == 4:  # rows and columns
            aligned = aligned.flatten(1, 2)
        if aligned is None or not self.leads_by_sequence or aligned.shape[:-1] != (batch, rows):
            raise NotImplementedError(
                f"{type(self.module).__name__} attends over {rows} tokens in a batch of {batch}, but its "
                f"{'other sequence' if memory else 'input'} is {None if given is None else tuple(given.shape)}: a "
                "variant that reads it cannot tell which row is which. Leave this tower out with modules=..."
            )
        return aligned

    def log_counts(self, visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Natural logarithm of the numbers of keys that `Variant.before_cache` is told of, once in a forward."""
        if self.mask is None or self.mask.counts() is not visible:
            return log_counts(visible, dtype)
        return self.mask.log_counts(dtype)

    def real_tokens(self, *, memory: bool = False) -> torch.Tensor:
        """`(B or 1, T or 1)` bool: which tokens of the module's input, or of the other sequence, are not padding."""
        mask, device = self.attention_mask, self.layer_input.device
        if self.layer_input.dim() == 2:  # a packed tower has none
            return torch.ones(1, 1, dtype=torch.bool, device=device)
        rows = self.layer_input.shape[1:-1].numel()
        if not memory:
            return real_tokens(mask, queries=rows, keys=key_length(mask, otherwise=rows), device=device)
        keys = rows if self.memory is None else self.memory.shape[1:-1].numel()
        how: dict[str, Any] = {"form": None, "meaning": "all", "is_cross": True, "batch": len(self.layer_input)}
        return read_mask(mask, **how, heads=1, queries=rows, keys=keys, device=device).real_keys()[:, 0]
