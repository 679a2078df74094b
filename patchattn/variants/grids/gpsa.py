"""GPSA: learned gates between attention by content and attention by place. ConViT, arXiv 2103.10697."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import VariantConfig, VariantInfo
from ...reading.grid_masks import CAPABILITIES, GridVariant
from ...softmax.rows import RowVariant


@dataclass(frozen=True, kw_only=True)
class GPSAConfig(VariantConfig):
    """Settings of gated positional self-attention."""

    gate: float | None = option(
        1.0,
        help="Gates before the sigmoid at the start: that share of attention is by place. None: there is none.",
        source="paper: a share of 0.73",
    )
    strength: float = option(1.0, help="How narrow attention by place is at the start.", source="paper", minimum=0.0)


class GPSA(GridVariant, RowVariant):
    """Attention that is a mixture of the model's own and of one that depends on where patches lie, by head.

    Tokens that are no patches attend as before, and have no part in attention by place.
    """

    config_class = GPSAConfig
    config: GPSAConfig

    def __init__(self, config: GPSAConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        if config.gate is None:
            return
        heads = site.require("query_heads", by="gpsa")
        self.gate = nn.Parameter(torch.full((heads,), config.gate))
        side = math.isqrt(heads)
        head = torch.arange(side**2)
        centre = (side - 1) / 2
        local = torch.stack([2 * (head // side - centre), 2 * (head % side - centre), -torch.ones(len(head))], dim=-1)
        others = torch.empty(heads - side**2, 3).uniform_(-1, 1) / math.sqrt(3)
        self.position = nn.Parameter(torch.cat([local * config.strength, others]))

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"gate": None}

    def fast_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def weights(self, logits: torch.Tensor, visible: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        content = logits.softmax(-1)
        if self.config.gate is None:
            return content
        grid, rows = call.grid(), call.context.rows
        keys, images = grid.places.to(logits.dtype), grid.images
        queries, own = (keys, images) if rows is None else (keys[:, rows], images[:, rows])
        away = keys[:, None] - queries[:, :, None]
        row, column = away.unbind(-1)
        vector = torch.stack([column, row, row**2 + column**2], dim=-1)
        by_place = torch.einsum("bqkc,hc->bhqk", vector, self.position.to(logits.dtype))
        same = ((own[:, :, None] == images[:, None]) & (own[:, :, None] >= 0))[:, None] & visible
        by_place = by_place.masked_fill(~same, torch.finfo(torch.float32).min / 4).softmax(-1)
        gate = self.gate.to(logits.dtype).sigmoid()[:, None, None] * same.any(-1, keepdim=True)
        return (1 - gate) * content + gate * by_place


register_variant(
    VariantInfo(
        name="gpsa",
        variant=GPSA,
        title="ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases",
        arxiv_id="2103.10697",
        year=2021,
        code="https://github.com/facebookresearch/convit",
        summary="Attention is a learned mixture, by head, of the model's own and of one by where patches lie.",
        extra_parameters="four values per query head and layer",
        needs_training=True,
        innermost=True,
        capabilities=CAPABILITIES - {"sinks"},
    )
)
