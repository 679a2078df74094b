"""H2O: keys that have received most attention stay, and the last ones. Zhang et al., arXiv 2306.14048."""

from dataclasses import dataclass

import torch

from patchattn_kernels import column_mass

from ...cache.state import SequenceState
from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import VariantInfo
from ...reading.eviction import CAPABILITIES, Event, ScoredConfig, ScoredEviction
from ...reading.windows import grouped

_RECEIVED = "received"
_SUMS = (
    "sums attention over all tokens so far, and takes none of them back: no cropped cache, and so no assisted "
    "decoding, under this variant."
)


@dataclass(frozen=True, kw_only=True)
class H2OConfig(ScoredConfig):
    """Settings of H2O; every field is described by `patchattn info h2o`."""

    event: Event = option(
        "call",
        help="When keys are dropped: 'call', at the end of every call; 'chunk', at the end of every call of several "
        "tokens, and not while it decodes.",
        source="paper",
        choices=("call", "chunk"),
    )
    recent_share: float = option(
        0.5,
        help="Share of the budget, rounded down, that the last keys have whatever attention they received.",
        source="released code: as many recent keys as heavy hitters",
        minimum=0.0,
        maximum=1.0,
    )


class H2O(ScoredEviction):
    """Attention to the keys that have received most attention so far, and to the last ones, in each kv head."""

    config_class = H2OConfig
    config: H2OConfig
    name = "h2o"
    default_budget = 2048
    splits_by_head = True

    def last(self, counts: torch.Tensor) -> torch.Tensor:
        return (counts * self.config.recent_share).floor().long()

    def observe(self, call: AttentionCall, state: SequenceState) -> None:
        mass, _ = column_mass(call.query, call.key, call.rule(), real=call.mask.real())
        received = grouped(mass, call.key.shape[1], "mean")
        before = state.per_key.get(_RECEIVED)
        state.write(_RECEIVED, received if before is None else before + received, per_key=True)
        state.settled = _SUMS

    def scores(self, call: AttentionCall, state: SequenceState) -> torch.Tensor:
        return state.per_key[_RECEIVED]


register_variant(
    VariantInfo(
        name="h2o",
        variant=H2O,
        title="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
        arxiv_id="2306.14048",
        year=2023,
        code="https://github.com/FMInference/H2O",
        summary="The kv cache keeps the keys that have received most attention, and the last ones.",
        extra_parameters="none",
        needs_training=False,
        looks_ahead=True,
        capabilities=CAPABILITIES,
        examples=({"budget": 6}, {"budget": 5, "event": "chunk", "recent_share": 0.2}, {"compression_ratio": 0.5}),
    )
)
