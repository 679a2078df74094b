"""Talking heads: logits are mixed over heads before the softmax, weights after it. arXiv 2003.02436."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.token_numbers import refuse_other_tokens
from ...core.variant import ALL_CAPABILITIES, VariantConfig, VariantInfo
from ...softmax.rows import RowVariant


@dataclass(frozen=True, kw_only=True)
class TalkingHeadsConfig(VariantConfig):
    """Settings of talking heads; every field is described by `patchattn info talking_heads`."""

    logits: bool = option(True, help="Mix logits over heads, before the softmax.", source="paper")
    weights: bool = option(True, help="Mix weights over heads, after the softmax.", source="paper")


class TalkingHeads(RowVariant):
    """Attention with weights `Q softmax(P s)`, s the logits of all heads and P and Q learned `(H, H)`, 1 at the start.

    What a row does not see is hidden after P, and so in every head that sums over others.
    """

    config_class = TalkingHeadsConfig
    config: TalkingHeadsConfig

    def __init__(self, config: TalkingHeadsConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        heads = site.require("query_heads", by="talking heads")
        self.of_logits = nn.Parameter(torch.eye(heads)) if config.logits else None
        self.of_weights = nn.Parameter(torch.eye(heads)) if config.weights else None

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"logits": False, "weights": False}

    @property
    def is_identity(self) -> bool:
        return not (self.config.logits or self.config.weights)

    def fast_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def weights(self, logits: torch.Tensor, visible: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        refuse_other_tokens(call.mask, by="talking_heads", site=self.site.name)
        if self.of_logits is not None:
            hidden = logits
            logits = _mixed(self.of_logits, logits.masked_fill(~visible, 0.0)).where(visible, hidden)
        weights = logits.softmax(-1)
        return weights if self.of_weights is None else _mixed(self.of_weights, weights * visible)


def _mixed(matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`(B, H, R, Tk)`: head g becomes the sum over h of `matrix[g, h]` times head h."""
    return torch.einsum("gh,bhrk->bgrk", matrix.to(rows.dtype), rows)


register_variant(
    VariantInfo(
        name="talking_heads",
        variant=TalkingHeads,
        title="Talking-Heads Attention",
        arxiv_id="2003.02436",
        year=2020,
        summary="Logits are mixed over heads before the softmax, and weights after it.",
        extra_parameters="two values per pair of query heads and layer",
        needs_training=True,
        innermost=True,
        capabilities=ALL_CAPABILITIES - {"sinks"},
        examples=({}, {"weights": False}),
    )
)
