"""Softpick: weights in proportion to the positive part of `exp(s) - 1`, so that heads may rest. arXiv 2504.20966."""

from dataclasses import dataclass

import torch

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import ALL_CAPABILITIES, VariantInfo
from ...softmax.blending import BlendConfig, BlendedVariant


@dataclass(frozen=True, kw_only=True)
class SoftpickConfig(BlendConfig):
    """Settings of softpick; every field is described by `patchattn info softpick`."""

    epsilon: float = option(
        1e-6,
        help="Added to the sum that weights are divided by, relative to the largest term.",
        source="released kernel; its plain code has 1e-8",
        minimum=1e-12,
        maximum=1e-2,
    )


class Softpick(BlendedVariant):
    """Attention with weights `max(exp(s) - 1, 0) / (sum of |exp(s) - 1| + epsilon)`: 0 below a logit of 0."""

    config_class = SoftpickConfig
    config: SoftpickConfig
    from_scratch = "blend=None"
    splits_by_head = True

    def normalised(self, logits: torch.Tensor, visible: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        return softpick(logits, visible, self.config.epsilon)


def softpick(logits: torch.Tensor, visible: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Weights `(..., n)` of logits, the hidden ones among which count for nothing; rows sum to 1 at most.

    Terms are divided by `exp(m)`, m the row's largest logit or 0. Below 0 nothing has a weight, whatever it is divided
    by, so that the paper's formula, which takes the largest logit itself, gives no other number.
    """
    largest = logits.detach().amax(-1, keepdim=True).clamp(min=0)
    terms = ((logits - largest).exp() - (-largest).exp()) * visible
    return terms.relu() / (terms.abs().sum(-1, keepdim=True) + epsilon)


register_variant(
    VariantInfo(
        name="softpick",
        variant=Softpick,
        title="Softpick: No Attention Sink, No Massive Activations with Rectified Softmax",
        arxiv_id="2504.20966",
        year=2025,
        code="https://github.com/zaydzuhri/softpick-attention",
        summary="Keys whose logit is below 0 get no weight, and heads without others rest.",
        extra_parameters="one value per query head and layer",
        needs_training=True,
        innermost=True,
        capabilities=ALL_CAPABILITIES - {"sinks"},
        examples=({}, {"blend": None}),
    )
)
