"""TOVA: what the last token attends to least goes. Oren et al., arXiv 2401.06104."""

from dataclasses import dataclass

import torch

from patchattn_kernels import column_mass

from ...cache.state import SequenceState
from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import VariantInfo
from ...reading.eviction import CAPABILITIES, EVENTS, Event, ScoredConfig, ScoredEviction


@dataclass(frozen=True, kw_only=True)
class TOVAConfig(ScoredConfig):
    """Settings of TOVA; every field is described by `patchattn info tova`."""

    event: Event = option("call", help=EVENTS, source="paper", choices=("prompt", "chunk", "call"))


class TOVA(ScoredEviction):
    """Attention to the keys that the last token attends to most, the same ones in all heads of a layer."""

    config_class = TOVAConfig
    name = "tova"
    default_budget = 512
    splits_by_head = True

    def window(self) -> int:
        return 1

    def scores(self, call: AttentionCall, state: SequenceState) -> torch.Tensor:
        row = call.row(call.query.shape[2] - 1)
        mass, _ = column_mass(row.query, row.key, row.rule())
        return call.of_all_heads(mass, 1).mean(dim=1, keepdim=True)


register_variant(
    VariantInfo(
        name="tova",
        variant=TOVA,
        title="Transformers are Multi-State RNNs",
        arxiv_id="2401.06104",
        year=2024,
        code="https://github.com/schwartz-lab-NLP/TOVA",
        summary="The kv cache keeps the keys that the last token attends to most, chosen anew at every token.",
        extra_parameters="none",
        needs_training=False,
        looks_ahead=True,
        capabilities=CAPABILITIES,
        examples=({"budget": 6}, {"compression_ratio": 0.5, "event": "prompt"}),
    )
)
