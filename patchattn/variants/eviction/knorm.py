"""Knorm: keys of small norm stay. Devoto et al., arXiv 2406.11430."""

from dataclasses import dataclass

import torch

from ...cache.state import SequenceState
from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.variant import VariantInfo
from ...reading.eviction import CAPABILITIES, ScoredConfig, ScoredEviction


@dataclass(frozen=True, kw_only=True)
class KnormConfig(ScoredConfig):
    """Settings of Knorm; every field is described by `patchattn info knorm`."""


class Knorm(ScoredEviction):
    """Attention to the keys of smallest norm, in each kv head."""

    config_class = KnormConfig
    name = "knorm"
    default_budget = 2048
    splits_by_head = True

    def window(self) -> int:
        return 0

    def scores(self, call: AttentionCall, state: SequenceState) -> torch.Tensor:
        key = call.key.to(torch.promote_types(call.key.dtype, torch.float32))
        return -key.norm(dim=-1)


register_variant(
    VariantInfo(
        name="knorm",
        variant=Knorm,
        title="A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
        arxiv_id="2406.11430",
        year=2024,
        code="https://github.com/alessiodevoto/l2compress",
        summary="The kv cache keeps the keys of smallest norm.",
        extra_parameters="none",
        needs_training=False,
        looks_ahead=True,
        capabilities=CAPABILITIES,
        examples=(
            {"budget": 6},
            {"budget": [5, [4, 7]], "event": "chunk"},
            {"compression_ratio": 0.5, "event": "call"},
        ),
    )
)
