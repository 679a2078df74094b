"""Sparsifiner's masks by an oracle: every patch reads the tokens that it attends to most. arXiv 2303.13755."""

from dataclasses import dataclass
from typing import Any

import torch

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import VariantConfig, VariantInfo
from ...reading.grid_masks import CAPABILITIES, GridVariant
from ...softmax.rows import RowVariant


@dataclass(frozen=True, kw_only=True)
class SparsifinerConfig(VariantConfig):
    """Settings of Sparsifiner's oracle."""

    keep: float = option(
        0.25,
        help="Share of the tokens that a patch reads, rounded up. 1: all.",
        source="paper",
        minimum=0.0,
        maximum=1.0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep == 0.0:
            raise ValueError("keep must be above 0: a patch reads one token at least.")


class Sparsifiner(GridVariant, RowVariant):
    """Attention of patches to as many tokens, those of the largest logits; tokens that are no patches read all."""

    config_class = SparsifinerConfig
    config: SparsifinerConfig

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"keep": 1.0}

    def weights(self, logits: torch.Tensor, visible: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        images = call.grid().images
        if call.context.rows is not None:
            images = images[:, call.context.rows]
        is_patch = (images >= 0)[:, None, :, None]
        count = (visible.sum(-1, keepdim=True) * self.config.keep).ceil()
        order = logits.detach().sort(dim=-1, descending=True, stable=True).indices
        rank = torch.arange(logits.shape[-1], device=logits.device).expand_as(order)
        rank = torch.empty_like(order).scatter(-1, order, rank)
        return logits.masked_fill((rank >= count) & is_patch, -torch.inf).softmax(-1)


register_variant(
    VariantInfo(
        name="sparsifiner",
        variant=Sparsifiner,
        title="Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",
        arxiv_id="2303.13755",
        year=2023,
        code="https://github.com/lim142857/Sparsifiner",
        summary="Patches read the tokens that they attend to most: what Sparsifiner learns to predict (an oracle).",
        extra_parameters="none",
        needs_training=False,
        innermost=True,
        capabilities=CAPABILITIES - {"sinks"},
    )
)
