"""A reconstruction of re-balancing contrastive decoding (RBD, arXiv 2409.06485), whose formulas are not public here.

The abstract has a branch whose image is noised, which is contrasted away, and one whose attention goes to image tokens,
which is strengthened. Here the model itself is the second, its attention raised as by PAI, and the first is VCD's.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import ALL_CAPABILITIES, VariantInfo
from ...decoding.guidance import GuidanceConfig, GuidedVariant
from ...decoding.other_images import NOISE_STEPS, OtherImagesVariant, noised
from ...decoding.variant import BranchStep, Step


@dataclass(frozen=True, kw_only=True)
class RBDLikeConfig(GuidanceConfig):
    """Settings of the reconstruction of RBD; every field is described by `patchattn info rbd_like`."""

    gamma: float = option(
        2.0,
        help="Strength of the contrast: gamma logits - (gamma - 1) logits of the noised image. 1: none, and then no "
        "cut and no second pass.",
        source="ours: the strength of VCD's scripts",
        minimum=0.0,
        maximum=1000.0,
    )
    alpha: float = option(
        0.2,
        help="By which share of its size a logit of an image token is raised; 0 raises none.",
        source="ours: PAI's",
        minimum=0.0,
        maximum=100.0,
    )
    noise_step: int = option(
        500,
        help="How far the image of the branch has gone into noise, of 0 to 999.",
        source="ours: VCD's",
        minimum=0,
        maximum=NOISE_STEPS - 1,
    )
    seed: int | None = option(
        0,
        help="Seed of the noise, which every image gets alike, so that answers can be repeated. None: torch's own "
        "generator draws anew for every image.",
        source="ours",
        minimum=0,
    )


class RBDLike(GuidedVariant, OtherImagesVariant):
    """Logits with attention to the image raised, contrasted with those of a noised image with attention as it was."""

    config_class = RBDLikeConfig
    config: RBDLikeConfig
    name = "rbd_like"

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"alpha": 0.0, "gamma": 1.0}

    @classmethod
    def raises(cls, config: RBDLikeConfig) -> bool:
        return config.alpha != 0.0

    def boosts(self, call: AttentionCall) -> torch.Tensor:
        return self.config.alpha * call.key_fact("rbd_like.image").float()

    def change(self, pixels: torch.Tensor) -> torch.Tensor:
        return noised(pixels, self.config.noise_step, self.config.seed)

    def branches(self, step: Step) -> list[BranchStep]:
        return [self.with_other_images(step)]


register_variant(
    VariantInfo(
        name="rbd_like",
        variant=RBDLike,
        title="Mitigating Hallucination in Visual-Language Models via Re-Balancing Contrastive Decoding",
        arxiv_id="2409.06485",
        year=2024,
        summary="A reconstruction: attention to images is raised, and logits are contrasted with a noised image's.",
        extra_parameters="none",
        needs_training=False,
        looks_ahead=True,
        innermost=True,
        capabilities=ALL_CAPABILITIES
        - {"bidirectional", "cross", "static_cache", "compile", "sinks", "position_bias", "without_images"},
        examples=({"first_layer": 0, "alpha": 0.5, "gamma": 1.5},),
    )
)
