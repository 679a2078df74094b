"""Block attention: blocks of a text are read each by itself, the last one reads all. Ma et al., arXiv 2409.15355."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.selection import require_causal
from ...core.sites import AttentionSite
from ...core.variant import ALL_CAPABILITIES, Attend, AttentionOutput, VariantInfo
from ...positions.pieces import QUERY, PieceVariant
from ...positions.spans import SpansConfig


@dataclass(frozen=True, kw_only=True)
class BlockAttentionConfig(SpansConfig):
    """Settings of block attention; every field is described by `patchattn info block_attention`."""


class BlockAttention(PieceVariant):
    """Attention of every block of a text to itself, and of what follows the blocks to all."""

    config_class = BlockAttentionConfig
    config: BlockAttentionConfig
    splits_by_head = True

    @classmethod
    def fit(
        cls, config: BlockAttentionConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[BlockAttentionConfig, Sequence[AttentionSite]]:
        """Leave out what is not causal self-attention."""
        because = "what follows the blocks reads them, which an encoder reads at once"
        return config, require_causal(model, sites, by="'block_attention'", because=because)

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        return inner(call.seeing(self.by_pair(call, lambda row, key: (row == key) | (row == QUERY))))


register_variant(
    VariantInfo(
        name="block_attention",
        variant=BlockAttention,
        title="Block-Attention for Efficient Prefilling",
        arxiv_id="2409.15355",
        year=2024,
        code="https://github.com/TemporaryLoRA/Block-Attention",
        summary="Documents in a prompt are read each by itself; the question reads all.",
        extra_parameters="none",
        needs_training=True,
        capabilities=ALL_CAPABILITIES - {"bidirectional", "cross"},
        examples=({"spans": [["document", 0, 3], ["document", 3, 6]]},),
    )
)
