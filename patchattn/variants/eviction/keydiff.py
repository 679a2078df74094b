"""KeyDiff: keys unlike the others stay. Park et al., arXiv 2504.15364."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...cache.state import SequenceState
from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import VariantInfo
from ...reading.eviction import CAPABILITIES, EVENTS, Event, ScoredConfig, ScoredEviction


@dataclass(frozen=True, kw_only=True)
class KeyDiffConfig(ScoredConfig):
    """Settings of KeyDiff; every field is described by `patchattn info keydiff`."""

    event: Event = option("chunk", help=EVENTS, source="paper: after every block", choices=("prompt", "chunk", "call"))


class KeyDiff(ScoredEviction):
    """Attention to the keys that point away from the mean direction of all, in each kv head."""

    config_class = KeyDiffConfig
    name = "keydiff"
    default_budget = 2048
    splits_by_head = True

    def window(self) -> int:
        return 0

    def scores(self, call: AttentionCall, state: SequenceState) -> torch.Tensor:
        real = call.mask.real_keys()[..., None]
        direction = F.normalize(call.key.to(torch.promote_types(call.key.dtype, torch.float32)), dim=-1)
        anchor = (direction * real).sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp(min=1)
        return -(direction * F.normalize(anchor, dim=-1)).sum(-1)


register_variant(
    VariantInfo(
        name="keydiff",
        variant=KeyDiff,
        title="KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained "
        "Environments",
        arxiv_id="2504.15364",
        year=2025,
        summary="The kv cache keeps the keys that are least like the mean of all.",
        extra_parameters="none",
        needs_training=False,
        looks_ahead=True,
        capabilities=CAPABILITIES,
        examples=({"budget": 6}, {"budget": 7, "event": "call"}, {"compression_ratio": 0.4, "event": "prompt"}),
    )
)
