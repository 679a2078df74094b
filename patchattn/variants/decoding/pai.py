"""PAI: attention to the image is raised, and logits are contrasted with those without it. arXiv 2407.21771."""

from dataclasses import dataclass
from typing import Any

import torch

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import ALL_CAPABILITIES, VariantInfo
from ...decoding.guidance import GuidanceConfig, GuidedVariant


@dataclass(frozen=True, kw_only=True)
class PAIConfig(GuidanceConfig):
    """Settings of PAI; every field is described by `patchattn info pai`."""

    alpha: float = option(
        0.2,
        help="By which share of its size a logit of an image token is raised; 0 raises none.",
        source="released code",
        minimum=0.0,
        maximum=100.0,
    )


class PAI(GuidedVariant):
    """Logits of image tokens are `s + alpha |s|` where tokens are chosen, in all heads."""

    config_class = PAIConfig
    config: PAIConfig
    name = "pai"

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"alpha": 0.0, "gamma": 1.0}

    @classmethod
    def raises(cls, config: PAIConfig) -> bool:
        return config.alpha != 0.0

    def boosts(self, call: AttentionCall) -> torch.Tensor:
        return self.config.alpha * call.key_fact("pai.image").float()


register_variant(
    VariantInfo(
        name="pai",
        variant=PAI,
        title="Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs",
        arxiv_id="2407.21771",
        year=2024,
        code="https://github.com/LALBJ/PAI",
        summary="Attention to images is raised where tokens are chosen; logits are contrasted with those without.",
        extra_parameters="none",
        needs_training=False,
        looks_ahead=True,
        innermost=True,
        capabilities=ALL_CAPABILITIES
        - {"bidirectional", "cross", "static_cache", "compile", "sinks", "position_bias", "without_images"},
        examples=({"first_layer": 0, "alpha": 0.5, "gamma": 1.5},),
    )
)
