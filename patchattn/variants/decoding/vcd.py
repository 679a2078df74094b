"""VCD: contrast with what the model says of the image under noise. arXiv 2311.16922."""

from dataclasses import dataclass
from typing import Any

import torch

from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import ALL_CAPABILITIES, VariantConfig, VariantInfo
from ...decoding.other_images import NOISE_STEPS, OtherImagesVariant, noised
from ...decoding.variant import BranchStep, Step, only_plausible


@dataclass(frozen=True, kw_only=True)
class VCDConfig(VariantConfig):
    """Settings of VCD; every field is described by `patchattn info vcd`."""

    alpha: float = option(
        1.0,
        help="Strength of the contrast: (1 + alpha) logits - alpha logits of the noised image.",
        source="released scripts; the code has 0.5 where it is not set",
        minimum=0.0,
        maximum=1000.0,
    )
    beta: float = option(
        0.1,
        help="Only tokens at least beta times as probable as the most probable one can be chosen; 0 allows all.",
        source="released code",
        minimum=0.0,
        maximum=1.0,
    )
    noise_step: int = option(
        500,
        help="How far the image has gone into noise, of 0 to 999.",
        source="released evaluation scripts",
        minimum=0,
        maximum=NOISE_STEPS - 1,
    )
    seed: int | None = option(
        0,
        help="Seed of the noise, which every image gets alike, so that answers can be repeated. None: torch's own "
        "generator draws anew for every image.",
        source="ours; the released code draws anew",
        minimum=0,
    )


class VCD(OtherImagesVariant):
    """Visual contrastive decoding: logits are contrasted with those of the same prompt and a noised image."""

    config_class = VCDConfig
    config: VCDConfig
    name = "vcd"

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"alpha": 0.0, "beta": 0.0}

    @property
    def is_identity(self) -> bool:
        return self.config.alpha == 0.0 and self.config.beta == 0.0

    def change(self, pixels: torch.Tensor) -> torch.Tensor:
        return noised(pixels, self.config.noise_step, self.config.seed)

    def branches(self, step: Step) -> list[BranchStep]:
        return [self.with_other_images(step)]

    def combine(self, logits: torch.Tensor, branch_logits: list[torch.Tensor]) -> torch.Tensor:
        alpha = self.config.alpha
        return only_plausible((1.0 + alpha) * logits - alpha * branch_logits[0], logits, self.config.beta)


register_variant(
    VariantInfo(
        name="vcd",
        variant=VCD,
        title="Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive Decoding",
        arxiv_id="2311.16922",
        year=2023,
        code="https://github.com/DAMO-NLP-SG/VCD",
        summary="Next-token logits are contrasted with those given a noised image.",
        extra_parameters="none",
        needs_training=False,
        capabilities=ALL_CAPABILITIES - {"static_cache", "compile", "without_images"},
        examples=({},),
    )
)
