"""EE-MLLM: image tokens do not attend to each other, and text reads all. arXiv 2408.11795."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import ALL_CAPABILITIES, Attend, AttentionOutput, VariantConfig, VariantInfo
from ...vision.images import needed_layout
from ...vision.marks import image_tokens
from ...vision.variant import ImageTokenVariant, language_model_sites


@dataclass(frozen=True, kw_only=True)
class EEMLLMConfig(VariantConfig):
    """Settings of EE-MLLM's composite attention; every field is described by `patchattn info ee_mllm`."""

    image_rows: Literal["self", "zero", "all"] = option(
        "self",
        help="What an image token attends to. self: itself alone, so that attention gives it its own value. zero: "
        "nothing, and attention gives it nothing. all: what it did before.",
        source="ours: the paper's path of image tokens is not known",
        choices=("self", "zero", "all"),
    )


class EEMLLM(ImageTokenVariant):
    """Attention of a language model whose image tokens see themselves alone, or nothing; text sees what it did."""

    config_class = EEMLLMConfig
    config: EEMLLMConfig
    splits_by_head = True

    @classmethod
    def fit(
        cls, config: EEMLLMConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[EEMLLMConfig, Sequence[AttentionSite]]:
        return config, language_model_sites(sites, needed_layout(model, "ee_mllm"), by="EE-MLLM")

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"image_rows": "all"}

    @property
    def is_identity(self) -> bool:
        return self.config.image_rows == "all"

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        is_image = image_tokens(call)
        if self.config.image_rows == "all":
            return inner(call)
        own = call.mask.row_order()[:, None, :, None] == call.mask.key_order()[:, :, None]
        output, weights = inner(call.seeing(own | ~is_image[:, None, :, None]))
        if self.config.image_rows == "self":
            return output, weights
        output = output.masked_fill(is_image[:, :, None, None], 0.0)
        return output, None if weights is None else weights.masked_fill(is_image[:, None, :, None], 0.0)


register_variant(
    VariantInfo(
        name="ee_mllm",
        variant=EEMLLM,
        title="EE-MLLM: A Data-Efficient and Compute-Efficient Multimodal Large Language Model",
        arxiv_id="2408.11795",
        year=2024,
        summary="Image tokens do not attend to each other, and text reads all.",
        extra_parameters="none",
        needs_training=True,
        capabilities=ALL_CAPABILITIES - {"bidirectional", "cross", "without_images"},
        examples=({}, {"image_rows": "zero"}),
    )
)
