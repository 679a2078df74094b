"""Attention Buckets: branches with other rotary bases are merged by how sure each is. Chen et al., arXiv 2312.04455."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import ALL_CAPABILITIES, Attend, AttentionOutput, VariantInfo
from ...decoding.text import TextDecodingVariant, decoder_sites
from ...decoding.variant import BranchStep, Step
from ...positions.rotary import ROTATED_BY, Rotary
from ...positions.variant import RotaryConfig, RotaryVariant


@dataclass(frozen=True, kw_only=True)
class AttentionBucketsConfig(RotaryConfig):
    """Settings of Attention Buckets; every field is described by `patchattn info attention_buckets`."""

    bases: tuple[float, ...] = option(
        (1.75, 1.8, 1.9, 2.0, 2.5),
        help="Rotary bases of the branches besides the model's own, as multiples of it. None of them changes nothing.",
        source="released code, for tools: 17500, 18000, 19000, 20000 and 25000 beside the model's 10000",
        minimum=1e-6,
        maximum=1e6,
    )

    @property
    def turns(self) -> bool:
        return bool(self.bases)


class AttentionBuckets(TextDecodingVariant, RotaryVariant):
    """Logits of the model and of branches of other rotary bases, weighted by the softmax of their largest logits."""

    config_class = AttentionBucketsConfig
    config: AttentionBucketsConfig
    name = "attention_buckets"
    attends = True
    splits_by_head = True

    @classmethod
    def fit(
        cls, config: AttentionBucketsConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[AttentionBucketsConfig, Sequence[AttentionSite]]:
        """Act in the decoder alone."""
        return super().fit(config, model, decoder_sites(model, sites))

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"bases": ()}

    @property
    def is_identity(self) -> bool:
        return not self.config.bases

    @property
    def keeps_state(self) -> bool:
        return True

    def branches(self, step: Step) -> list[BranchStep]:
        return [self.same(step) for _ in self.config.bases]

    def combine(self, logits: torch.Tensor, branch_logits: list[torch.Tensor]) -> torch.Tensor:
        every = torch.stack([logits, *branch_logits])
        weights = every.amax(-1, keepdim=True).softmax(0)
        return (weights * every).sum(0)

    def key_facts(self, call: AttentionCall) -> Mapping[str, torch.Tensor]:
        if call.branch == 0 or not self._rotary.is_rotated:
            return {}
        return self.rotated_by(call)

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        rotary = self._rotary
        if call.branch == 0 or not rotary.is_rotated:
            return inner(call)
        row, key = rotary.rotated_by(call), call.key_fact(ROTATED_BY)
        frequencies = self._frequencies(row, self.config.bases[call.branch - 1])
        return inner(
            call.replace(
                query=rotary.turned(call.query, row, row, frequencies),
                key=rotary.turned(call.key, key, key, frequencies),
            )
        )

    @property
    def _rotary(self) -> Rotary:
        if self.rotary is None:
            raise RuntimeError(f"{self.name} was not prepared for {self.site.name}: attach it by patch_model.")
        return self.rotary

    def _frequencies(self, positions: torch.Tensor, multiple: float) -> torch.Tensor:
        """`(r / 2,)` the model's own with its base multiplied, in radians per position."""
        cos, sin = self._rotary.tables(torch.ones_like(positions[:1, :1]), torch.float64)
        own = torch.atan2(sin, cos).flatten()
        pairs = torch.arange(len(own), device=own.device, dtype=own.dtype)
        return own * multiple ** (-pairs / len(own))


register_variant(
    VariantInfo(
        name="attention_buckets",
        variant=AttentionBuckets,
        title="Fortify the Shortest Stave in Attention: Enhancing Context Awareness of Large Language Models for "
        "Effective Tool Use",
        arxiv_id="2312.04455",
        year=2023,
        code="https://github.com/AlibabaResearch/DAMO-ConvAI/tree/main/attention-buckets",
        summary="Next-token logits are merged from branches with other rotary bases, by how sure each is.",
        extra_parameters="none",
        needs_training=False,
        capabilities=ALL_CAPABILITIES - {"static_cache", "compile", "position_bias"},
        presets={"rag": {"bases": (1.3, 1.6, 1.9, 2.2, 2.5, 2.8)}},
        examples=({"bases": (0.001, 0.0001, 0.01)},),
    )
)
