"""CAD: contrast with what the model says without the context that a prompt holds. arXiv 2305.14739."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import ALL_CAPABILITIES, VariantConfig, VariantInfo
from ...decoding.text import TextDecodingVariant, checked_span, decoder_sites, spans_of
from ...decoding.variant import BranchStep, Step


@dataclass(frozen=True, kw_only=True)
class CADConfig(VariantConfig):
    """Settings of CAD; every field is described by `patchattn info cad`."""

    alpha: float = option(
        0.5,
        help="Strength of the contrast: (1 + alpha) logits - alpha logits without the context; 0 changes nothing.",
        source="paper: 0.5 for summaries; 1 where the context contradicts what the model knows",
        minimum=0.0,
        maximum=1000.0,
    )
    span: tuple[int, ...] | None = option(
        None,
        parse=checked_span,
        help="Where the context is in every prompt: number of its first token, and of the one after its last; the "
        "first token that is no padding is 0. None: `with context_spans(...)` says it of each.",
    )


class CAD(TextDecodingVariant):
    """Context-aware decoding: logits are contrasted with those of the same prompt without its context."""

    config_class = CADConfig
    config: CADConfig
    splits_by_head = True

    @classmethod
    def fit(
        cls, config: CADConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[CADConfig, Sequence[AttentionSite]]:
        return config, decoder_sites(model, sites)[-1:]

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"alpha": 0.0}

    @property
    def is_identity(self) -> bool:
        return self.config.alpha == 0.0

    def branches(self, step: Step) -> list[BranchStep]:
        if not step.is_first:
            return [self.without(step, torch.zeros_like(step.real))]
        span = None if self.config.span is None else checked_span(self.config.span)
        return [self.without(step, spans_of(step, span, by="CAD"))]

    def combine(self, logits: torch.Tensor, branch_logits: list[torch.Tensor]) -> torch.Tensor:
        return (1.0 + self.config.alpha) * logits - self.config.alpha * branch_logits[0]


register_variant(
    VariantInfo(
        name="cad",
        variant=CAD,
        title="Trusting Your Evidence: Hallucinate Less with Context-aware Decoding",
        arxiv_id="2305.14739",
        year=2023,
        code="https://github.com/xhan77/context-aware-decoding",
        summary="Next-token logits are contrasted with those given the prompt without its context.",
        extra_parameters="none",
        needs_training=False,
        capabilities=ALL_CAPABILITIES - {"static_cache", "compile"},
        examples=({"span": [1, 3]}, {"span": [0, 2], "alpha": 1.0}),
    )
)
