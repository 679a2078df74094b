"""Choices of blocks by windows of keys that overlap: each window is compressed into the mean of its keys."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from patchattn_kernels import AttentionRule
from patchattn_kernels.rows import full_precision, row_logits

from ..core import ranks
from ..core.call import AttentionCall
from ..core.mask import Mask
from ..core.settings import option
from ..core.variant import VariantConfig
from .forced import ends_of_text, visible_pages
from .groups import any_of_group, reduced
from .index import sums_of_pages
from .pages import PagedSelection
from .selection import plain_own


@dataclass(frozen=True, kw_only=True)
class CompressedConfig(VariantConfig):
    """Settings of what chooses blocks by compressed keys, as NSA does."""

    block: int = option(64, help="Keys of a block that is chosen.", source="paper", unit="keys", minimum=1)
    length: int = option(32, help="Keys that are compressed into one.", source="paper", unit="keys", minimum=1)
    stride: int = option(
        16,
        help="Keys from the start of one compressed key to that of the next.",
        source="paper",
        unit="keys",
        minimum=1,
    )
    first: int = option(
        1, help="First blocks of a text that are always read.", source="paper", unit="blocks", minimum=0
    )
    local: int = option(
        2,
        help="Last blocks that are always read, the token's own among them.",
        source="paper",
        unit="blocks",
        minimum=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length % self.stride or self.block % self.stride:
            raise ValueError(
                f"length and block must be multiples of stride, got length={self.length}, block={self.block} and "
                f"stride={self.stride}."
            )


class CompressedSelection(PagedSelection):
    """A variant whose settings are a `CompressedConfig`, with a `top_k` of blocks that a token reads; None: all."""

    config: CompressedConfig

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"top_k": None}

    def blocks(self, call: AttentionCall, top_k: int | None) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Two of `(B, Hkv, Tq, P)` bool: the blocks that queries of a kv head see, and those that are always read.

        Args:
            call: the call.
            top_k: blocks that a token reads; None: all.

        Returns:
            None where every block is read.
        """
        self.check(call)
        config, groups = self.config, call.key.shape[1]
        if top_k is None or call.mask.columns <= top_k * config.block:
            return None
        visible, own = visible_pages(call.mask, config.block)
        forced = ends_of_text(visible, own, config.first, config.local)
        return any_of_group(visible, groups), any_of_group(forced, groups)

    def group_weights(self, call: AttentionCall) -> torch.Tensor:
        """`(B, Hkv, Tq, W)` the compressed weights of a kv head's query heads, summed up."""
        return reduced(self.compressed_weights(call), call.key.shape[1], "sum")

    def compressed_weights(self, call: AttentionCall) -> torch.Tensor:
        """`(B, H, Tq, W)` attention to the means of keys, 0 to those that are not wholly seen."""
        means = self.means(call, "keys", call.key)
        seen = self.seen_windows(call.mask, means.shape[2])
        rule = AttentionRule(call.scaling, softcap=call.kwargs.get("softcap"), mask=seen)
        logits = row_logits(full_precision(call.query), means, rule, slice(None))
        return logits.softmax(dim=-1).masked_fill(~seen, 0.0)

    def means(self, call: AttentionCall, name: str, states: torch.Tensor) -> torch.Tensor:
        """`(B, Hkv, W, D)` of the keys or values in the W = (Tk - length) // stride + 1 complete windows.

        Args:
            call: the call.
            name: of what is remembered of them.
            states: `(B, Hkv, Tk, D)`.
        """
        length, stride = self.config.length, self.config.stride
        if states.requires_grad and torch.is_grad_enabled():  # what a kv cache remembers has no gradient
            parts = sums_of_pages(states[:, :, : states.shape[2] // stride * stride], stride)
        else:
            parts = self.facts(call.replace(key=states), name, stride, lambda some, _: sums_of_pages(some, stride))
        ratio = length // stride
        count = max(0, parts.shape[2] - ratio + 1)
        return torch.stack([parts[:, :, n : n + count] for n in range(ratio)]).sum(dim=0) / length

    def seen_windows(self, mask: Mask, count: int) -> torch.Tensor:
        """`(B or 1, 1 or H, Tq, W)` bool: of which of the first W windows a query sees every key.

        Args:
            mask: of the call.
            count: W.
        """
        length = self.config.length
        start = torch.arange(count, device=mask.device) * self.config.stride
        if plain_own(mask) is not None:
            return (start + length - 1 <= ranks.own(mask)[:, :, None])[:, None]
        upto = F.pad(mask.seen().cumsum(dim=-1, dtype=torch.int32), (1, 0))
        return upto[..., start + length] - upto[..., start] == length

    def by_stride(self, windows: torch.Tensor, blocks: int, fill: float) -> torch.Tensor:
        """`(..., P, block / stride, length / stride)` what is said of windows `(..., W)`, by the strides of blocks.

        The last dimension is of the windows that hold a stride of keys, so that one stands there for each that it
        shares with a block.

        Args:
            windows: of the first W windows.
            blocks: P.
            fill: what is said where there is no window.
        """
        ratio, per_block = self.config.length // self.config.stride, self.config.block // self.config.stride
        padded = F.pad(windows, (ratio - 1, blocks * per_block - windows.shape[-1]), value=fill)
        return padded.unfold(-1, ratio, 1).unflatten(-2, (blocks, per_block))
