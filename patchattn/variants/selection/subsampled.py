"""Stochastically subsampled attention: while training, a layer reads keys drawn at random. arXiv 2306.01705."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from ...core import ranks
from ...core.call import AttentionCall
from ...core.keeping import of_query_heads
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import VariantConfig, VariantInfo
from ...reading.draws import BITS, drawn_numbers
from ...reading.selection import CAPABILITIES, SelectionVariant


@dataclass(frozen=True, kw_only=True)
class SubsampledConfig(VariantConfig):
    """Settings of stochastically subsampled attention."""

    keep: float = option(
        0.25,
        help="Share of the keys that is drawn; a token's own key is read besides. 1: all.",
        source="abstract: four to eight times less",
        minimum=0.0,
        maximum=1.0,
    )
    when: Literal["training", "always"] = option(
        "training",
        help="When keys are drawn: while the model trains, or in evaluation mode too.",
        source="paper: a dense model at test, or several draws together",
        choices=("training", "always"),
    )
    seed: int | None = option(
        None,
        help="Seed of a layer's draws, which are the same in every call. None: drawn anew, from torch's generator.",
        source="ours, to repeat a draw at test",
        minimum=0,
        maximum=2**31 - 1,
    )


class Subsampled(SelectionVariant):
    """Attention to keys that are drawn for every layer, alike for all heads and queries, and to each query's own."""

    config_class = SubsampledConfig
    config: SubsampledConfig

    @property
    def is_identity(self) -> bool:
        return self.config.keep == 1.0

    @property
    def keeps_state(self) -> bool:
        return self.config.seed is not None  # a sliding cache then counts what it lets go of

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"keep": 1.0}

    def select(self, call: AttentionCall) -> torch.Tensor | None:
        config, mask = self.config, call.mask
        if config.keep == 1.0 or not (self.training or config.when == "always"):
            return None
        if config.seed is None:
            drawn = torch.rand(len(call.query), 1, 1, mask.keys, device=mask.device) < config.keep
        else:
            number = drawn_numbers(mask.key_places(), config.seed, self.site.layer_index)
            drawn = (number < config.keep * 2**BITS)[:, :, None]
        column = ranks.by_key(mask, torch.arange(mask.columns - mask.dropped, device=mask.device)[None])
        return of_query_heads(drawn | (column[:, :, None] == ranks.own(mask)[:, None, :, None]), mask.heads)


register_variant(
    VariantInfo(
        name="subsampled",
        variant=Subsampled,
        title="The Information Pathways Hypothesis: Transformers are Dynamic Self-Ensembles",
        arxiv_id="2306.01705",
        year=2023,
        code="https://github.com/shamim-hussain/ssa",
        summary="While training, every layer reads keys that are drawn at random.",
        extra_parameters="none",
        needs_training=True,
        capabilities=CAPABILITIES,
        examples=({"keep": 0.4, "when": "always", "seed": 1},),
    )
)
