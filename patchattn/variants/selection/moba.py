"""MoBA: every token reads its own block of keys and those whose mean key it matches best. arXiv 2502.13189."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from patchattn_kernels.block_lists import block_means

from ...core.call import AttentionCall
from ...core.places import Places
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import VariantConfig, VariantInfo
from ...reading.groups import heads_option
from ...reading.index import counted_keys
from ...reading.pages import PagedSelection
from ...reading.selection import CAPABILITIES


@dataclass(frozen=True, kw_only=True)
class MoBAConfig(VariantConfig):
    """Settings of MoBA."""

    block: int = option(4096, help="Keys of a block.", source="released code: its example", unit="keys", minimum=1)
    top_k: int | None = option(
        12,
        help="Blocks that a token reads, its own among them. None: all.",
        source="released code: its example",
        unit="blocks",
        minimum=1,
    )
    heads: Literal["kv", "query"] = heads_option("query", source="paper")
    decode: Literal["dense", "selected"] = option(
        "dense",
        help="Tokens that come alone behind cached ones: dense, or they choose as those of a prompt do.",
        source="paper: full attention while generating",
        choices=("dense", "selected"),
    )

    @property
    def looks_ahead(self) -> bool:
        """Whether a token reads all keys depends on whether it comes alone."""
        return self.top_k is not None and self.decode == "dense"


class MoBA(PagedSelection):
    """Attention to the blocks whose mean keys have the largest products with the query."""

    config_class = MoBAConfig
    config: MoBAConfig
    splits_by_head = True

    @property
    def is_identity(self) -> bool:
        return self.config.top_k is None

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"top_k": None}

    def select(self, call: AttentionCall) -> torch.Tensor | Places | None:
        self.check(call)
        block, top_k = self.config.block, self.config.top_k
        if top_k is None or (self.config.decode == "dense" and call.decodes) or call.mask.columns <= top_k * block:
            return None
        means = self.facts(
            call, "means", block, lambda keys, part: block_means(keys, block, counted_keys(call.mask, block, part))
        )
        query = call.query.detach()
        return self.chosen(call, query, means.detach(), page=block, count=top_k, heads=self.config.heads)


register_variant(
    VariantInfo(
        name="moba",
        variant=MoBA,
        title="MoBA: Mixture of Block Attention for Long-Context LLMs",
        arxiv_id="2502.13189",
        year=2025,
        code="https://github.com/MoonshotAI/MoBA",
        summary="Every token reads its own block of keys and those whose mean key it matches best.",
        extra_parameters="none",
        needs_training=True,
        capabilities=CAPABILITIES,
        presets={"benchmark": {"block": 2048, "top_k": 3}},
        examples=(
            {"block": 1, "top_k": 3, "decode": "selected"},
            {"block": 1, "top_k": 3, "heads": "kv", "decode": "selected"},
        ),
    )
)
