"""LServe's choice of pages: they are scored by smaller ones, and it lasts some tokens. arXiv 2502.14866."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from ...core.call import AttentionCall
from ...core.places import Places
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import VariantInfo
from ...reading.groups import heads_option
from ...reading.pages import BoundedSelection, PagedConfig
from ...reading.refresh import refresh_option
from ...reading.scores import upper_bounds
from ...reading.selection import CAPABILITIES


@dataclass(frozen=True, kw_only=True)
class LServeConfig(PagedConfig):
    """Settings of LServe's page selection."""

    budget: int | None = option(
        4096,
        help="Keys that a token reads, rounded up to whole pages, its own page among them. None: all.",
        source="released code",
        unit="keys",
        minimum=1,
    )
    page: int = option(64, help="Keys of a page, which is read as a whole.", source="released code", minimum=1)
    logical: int = option(
        16, help="Keys of the smaller pages that a page is scored by.", source="released code", unit="keys", minimum=1
    )
    refresh: int = refresh_option(4, source="released code")
    heads: Literal["kv", "query"] = heads_option("query", source="released code")
    dense_layers: int = option(0, help="First layers that stay dense.", source="released code", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.page % self.logical:
            raise ValueError(f"page must be a multiple of logical={self.logical}, got {self.page}.")

    @property
    def looks_ahead(self) -> bool:
        """Whether a token chooses depends on whether it comes alone, and which ones came before it."""
        return self.budget is not None and (super().looks_ahead or self.refresh > 1)


class LServe(BoundedSelection):
    """Attention to the pages with the highest bounds of their smaller pages; decoding tokens share a choice."""

    config_class = LServeConfig
    config: LServeConfig
    splits_by_head = True

    def select(self, call: AttentionCall) -> torch.Tensor | Places | None:
        budget, page, heads = self.config.budget, self.config.page, self.config.heads
        if self.is_dense(call) or budget is None or call.mask.columns <= budget:
            return None
        count = -(-budget // page)

        def choose() -> torch.Tensor:
            return self.best_pages(call, self._scores(call), page, count, heads)

        return self.lasting(call, choose, page=page, count=count, every=self.config.refresh)

    def _scores(self, call: AttentionCall) -> torch.Tensor:
        """`(B, H, Tq, P)` the highest bound among the smaller pages of each."""
        logical = self.config.logical
        bounds = upper_bounds(call.query, self.ends(call, "logical", logical, within=self.config.page))
        ratio = self.config.page // logical
        return (
            F.pad(bounds, (0, -bounds.shape[-1] % ratio), value=float("-inf")).unflatten(-1, (-1, ratio)).amax(dim=-1)
        )


register_variant(
    VariantInfo(
        name="lserve",
        variant=LServe,
        title="LServe: Efficient Long-sequence LLM Serving with Unified Sparse Attention",
        arxiv_id="2502.14866",
        year=2025,
        code="https://github.com/mit-han-lab/omniserve",
        summary="Decoding tokens read the pages of keys that score highest by smaller ones, and share a choice.",
        extra_parameters="none",
        needs_training=False,
        capabilities=CAPABILITIES,
        examples=(
            {"budget": 3, "page": 1, "logical": 1, "refresh": 1, "prefill": "selected"},
            {"budget": 3, "page": 1, "logical": 1, "refresh": 1, "heads": "kv", "prefill": "selected"},
        ),
    )
)
