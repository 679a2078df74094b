"""Quest: a decoding token reads the pages of keys that it could attend to most. arXiv 2406.10774."""

from dataclasses import dataclass

import torch

from ...core.call import AttentionCall
from ...core.places import Places
from ...core.registry import register_variant
from ...core.variant import VariantInfo
from ...reading.pages import BoundedSelection, PagedConfig
from ...reading.selection import CAPABILITIES


@dataclass(frozen=True, kw_only=True)
class QuestConfig(PagedConfig):
    """Settings of Quest."""

    @property
    def looks_ahead(self) -> bool:
        return self.budget is not None and super().looks_ahead


class Quest(BoundedSelection):
    """Attention to the pages whose keys have the highest upper bound of their products with the query."""

    config_class = QuestConfig
    config: QuestConfig
    splits_by_head = True

    def select(self, call: AttentionCall) -> torch.Tensor | Places | None:
        return None if self.is_dense(call) else self.by_bounds(call, self.config.budget)


register_variant(
    VariantInfo(
        name="quest",
        variant=Quest,
        title="Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
        arxiv_id="2406.10774",
        year=2024,
        code="https://github.com/mit-han-lab/Quest",
        summary="A decoding token reads the pages of keys that it could attend to most.",
        extra_parameters="none",
        needs_training=False,
        capabilities=CAPABILITIES,
        examples=(
            {"budget": 3, "page": 1, "prefill": "selected", "dense_layers": 0},
            {"budget": 3, "page": 1, "heads": "query", "prefill": "selected", "dense_layers": 0},
        ),
    )
)
