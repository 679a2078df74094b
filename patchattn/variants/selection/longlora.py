"""LongLoRA's shifted sparse attention: while training, tokens read their own group of a text. arXiv 2309.12307."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import VariantConfig, VariantInfo
from ...reading.lines import texts_of
from ...reading.selection import CAPABILITIES
from ...reading.whole import WholeSelection


@dataclass(frozen=True, kw_only=True)
class LongLoRAConfig(VariantConfig):
    """Settings of LongLoRA's attention."""

    groups: int = option(
        4, help="Groups of equal length in a text. 1: all tokens read all.", source="paper: a quarter each", minimum=1
    )
    shifted: float = option(
        0.5,
        help="Share of the heads, the last ones, whose groups are shifted. SF-Attn of SinkLoRA shifts fewer.",
        source="paper",
        unit="ratio",
        minimum=0.0,
        maximum=1.0,
    )
    sinks: int = option(
        0,
        help="First keys of a text that all tokens read, as in SF-Attn of SinkLoRA.",
        source="paper",
        unit="keys",
        minimum=0,
    )
    when: Literal["training", "always"] = option(
        "training",
        help="When tokens read their group alone: while the model trains, or in evaluation mode too.",
        source="paper: dense at inference",
        choices=("training", "always"),
    )

    @property
    def looks_ahead(self) -> bool:
        """How long a group is depends on how long the text is."""
        return self.groups > 1


class LongLoRA(WholeSelection):
    """Attention within groups of tokens, which for some of the heads lie half a group further on."""

    config_class = LongLoRAConfig
    config: LongLoRAConfig

    @property
    def is_identity(self) -> bool:
        return self.config.groups == 1

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"groups": 1}

    def select(self, call: AttentionCall) -> torch.Tensor | None:
        self.check(call)
        groups, mask = self.config.groups, call.mask
        if groups == 1 or call.decodes or not (self.training or self.config.when == "always"):
            return None
        texts, row, key = texts_of(mask), mask.row_places(), mask.key_places()[:, 0]
        is_shifted = torch.arange(2, device=mask.device)[:, None]
        numbers = []
        for place, behind in ((row, texts.behind_rows), (key, texts.behind_keys)):
            size = ((place + behind + groups - 1) // groups).clamp(min=1)[:, None]
            numbers.append(torch.div(place[:, None] - 1 - size // 2 * is_shifted, size, rounding_mode="floor"))
        together = numbers[0][..., None] == numbers[1][:, :, None]
        together = together | (key <= self.config.sinks)[:, None, None]
        heads = torch.arange(mask.heads, device=mask.device)
        return together.index_select(1, (heads >= mask.heads - round(mask.heads * self.config.shifted)).long())


register_variant(
    VariantInfo(
        name="longlora",
        variant=LongLoRA,
        title="LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models",
        arxiv_id="2309.12307",
        year=2023,
        code="https://github.com/dvlab-research/LongLoRA",
        summary="While training, every token reads its own group of the text; groups of half of the heads are shifted.",
        extra_parameters="none",
        needs_training=True,
        looks_ahead=True,
        capabilities=CAPABILITIES,
        examples=({"groups": 3, "when": "always"}, {"groups": 3, "shifted": 0.25, "sinks": 1, "when": "always"}),
    )
)
