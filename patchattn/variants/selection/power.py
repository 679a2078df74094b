"""PowerAttention: blocks at distances that are powers of two are read. arXiv 2503.03588."""

from dataclasses import dataclass
from typing import Any

import torch

from patchattn_kernels import BlockLists, lists_from_mask

from ...core.call import AttentionCall
from ...core.keeping import of_query_heads
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import VariantConfig, VariantInfo
from ...reading.selection import CAPABILITIES, SelectionVariant


@dataclass(frozen=True, kw_only=True)
class PowerConfig(VariantConfig):
    """Settings of PowerAttention."""

    block: int = option(256, help="Tokens of a block.", source="paper", unit="tokens", minimum=1)
    local: int | None = option(
        5,
        help="Last blocks that a token reads, its own among them. None: all.",
        source="paper, at 32k tokens",
        unit="blocks",
        minimum=1,
    )


class Power(SelectionVariant):
    """Attention to the first block, the last ones, and those a power of two of blocks before a token's own."""

    config_class = PowerConfig
    config: PowerConfig
    keeps_state = True  # a sliding cache then counts what it lets go of
    splits_by_head = True

    @property
    def is_identity(self) -> bool:
        return self.config.local is None

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"local": None}

    def select(self, call: AttentionCall) -> torch.Tensor | BlockLists | None:
        block, local, mask = self.config.block, self.config.local, call.mask
        # of the blocks up to the third after the own one only the first may be missing, and it is the sink
        if local is None or mask.columns <= max(local + 1, 4) * block:
            return None
        is_plain = mask.pairs is None and mask.real_columns is None and mask.index is None and mask.sequence is None
        if is_plain and mask.dropped == 0 and isinstance(mask.own, int):
            rows = block if mask.own % block == 0 else 1
            own = torch.arange(mask.own, mask.own + mask.queries, rows, device=call.query.device) // block
            other = torch.arange(-(-mask.keys // block), device=call.query.device)
            return lists_from_mask(self.reads(own[:, None], other)[None, None], rows, block)
        own, key = mask.row_places()[:, None, :, None], of_query_heads(mask.key_places(), mask.heads)[:, :, None]
        return self.reads((own - 1) // block, torch.div(key - 1, block, rounding_mode="floor"))

    def reads(self, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Which of other blocks are read from own ones, by their numbers in the text."""
        away = own - other
        return (away < (self.config.local or 1)) | ((away & (away - 1)) == 0) | (other == 0)


register_variant(
    VariantInfo(
        name="power",
        variant=Power,
        title="PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention",
        arxiv_id="2503.03588",
        year=2025,
        summary="Every token reads the first block, the last ones, and those a power of two of blocks before its own.",
        extra_parameters="none",
        needs_training=True,
        capabilities=CAPABILITIES,
        examples=({"block": 1, "local": 2},),
    )
)
