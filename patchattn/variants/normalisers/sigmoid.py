"""Sigmoid attention: every weight is a sigmoid of its own logit, and rows need not sum to 1. arXiv 2409.04431."""

from dataclasses import dataclass

import torch

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import ALL_CAPABILITIES, VariantInfo
from ...softmax.blending import BlendConfig, BlendedVariant


@dataclass(frozen=True, kw_only=True)
class SigmoidConfig(BlendConfig):
    """Settings of sigmoid attention; every field is described by `patchattn info sigmoid`."""

    bias: float | None = option(
        None,
        help="Added to all logits. None: minus the logarithm of how many keys the row sees, so that chunks, padding "
        "and lengths agree.",
        source="paper: minus the logarithm of the length, which its code makes a constant",
        minimum=-100.0,
        maximum=100.0,
    )


class Sigmoid(BlendedVariant):
    """Attention with weights `sigmoid(s + bias)`."""

    config_class = SigmoidConfig
    config: SigmoidConfig
    from_scratch = "blend=None"
    splits_by_head = True

    def normalised(self, logits: torch.Tensor, visible: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        if self.config.bias is not None:
            return (logits + self.config.bias).sigmoid()
        counts = visible.sum(-1, keepdim=True).clamp(min=1).to(logits.dtype)
        return (logits - counts.log()).sigmoid()


register_variant(
    VariantInfo(
        name="sigmoid",
        variant=Sigmoid,
        title="Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
        arxiv_id="2409.04431",
        year=2024,
        code="https://github.com/apple/ml-sigmoid-attention",
        summary="Every weight is a sigmoid of its own logit, whatever the other keys of the row are.",
        extra_parameters="one value per query head and layer",
        needs_training=True,
        innermost=True,
        capabilities=ALL_CAPABILITIES - {"sinks"},
        examples=({}, {"blend": None}),
    )
)
