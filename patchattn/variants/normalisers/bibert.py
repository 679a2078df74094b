"""BiBERT's attention: a key has a weight or none, by the sign of its logit. arXiv 2203.06390."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.selection import require_bidirectional
from ...core.sites import AttentionSite
from ...core.variant import ALL_CAPABILITIES, VariantInfo
from ...softmax.blending import BlendConfig, BlendedVariant


@dataclass(frozen=True, kw_only=True)
class BiBERTConfig(BlendConfig):
    """Settings of BiBERT's attention; every field is described by `patchattn info bibert`."""


class BiBERT(BlendedVariant):
    """Attention with equal weights on the keys whose logit is 0 or more, none on the others.

    A step has no slope: gradients take that of the logit itself where it lies between -1 and 1, and 0 elsewhere.
    """

    config_class = BiBERTConfig
    config: BiBERTConfig
    from_scratch = "blend=None"
    splits_by_head = True

    @classmethod
    def fit(
        cls, config: BiBERTConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[BiBERTConfig, Sequence[AttentionSite]]:
        """Leave out what is not bidirectional self-attention."""
        return super().fit(
            config, model, require_bidirectional(model, sites, by="'bibert'", because="it is made for encoders")
        )

    def normalised(self, logits: torch.Tensor, visible: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        slope = logits.clamp(-1, 1)
        chosen = ((logits >= 0).to(logits.dtype) + slope - slope.detach()) * visible
        return chosen / chosen.sum(-1, keepdim=True).clamp(min=1)


register_variant(
    VariantInfo(
        name="bibert",
        variant=BiBERT,
        title="BiBERT: Accurate Fully Binarized BERT",
        arxiv_id="2203.06390",
        year=2022,
        code="https://github.com/htqin/BiBERT",
        summary="Keys whose logit is 0 or more share attention equally.",
        extra_parameters="one value per query head and layer",
        needs_training=True,
        innermost=True,
        capabilities=ALL_CAPABILITIES - {"causal", "cross", "sinks"},
        examples=({}, {"blend": None}),
    )
)
