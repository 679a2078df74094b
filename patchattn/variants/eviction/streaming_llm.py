"""StreamingLLM: the first keys and the last ones stay. Xiao et al., arXiv 2309.17453."""

from dataclasses import dataclass
from typing import Any, Literal

from patchattn_kernels import SinkAndRecent, sink_and_recent

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import Attend, AttentionOutput, VariantInfo
from ...positions.two_queries import with_two_queries
from ...positions.variant import RotaryConfig, RotaryVariant
from ...reading.eviction import CAPABILITIES, EvictionVariant, keep_first_and_last


@dataclass(frozen=True, kw_only=True)
class StreamingLLMConfig(RotaryConfig):
    """Settings of StreamingLLM; every field is described by `patchattn info streaming_llm`."""

    sinks: int = option(
        4,
        help="First real keys of a sequence, which stay.",
        source="paper",
        unit="keys",
        minimum=0,
        maximum=1 << 30,
    )
    recent: int = option(
        2000,
        help="Last real keys that stay behind a token; the next one sees them and its own.",
        source="the authors' chat script",
        unit="keys",
        minimum=1,
        maximum=1 << 30,
    )
    slack: int = option(
        32,
        help="So many last tokens can be taken back exactly (assisted decoding); as many more keys are stored, hidden.",
        source="ours: transformers guesses 20 tokens at a time",
        unit="tokens",
        minimum=0,
    )
    positions: Literal["original", "reindexed"] = option(
        "original",
        help="Where a token stands to the sinks: at its own position, or at its place among the keys that it sees, so "
        "that no distance grows beyond sinks + recent.",
        source="ours, as DuoAttention's streaming heads; paper: its place in the cache",
        choices=("original", "reindexed"),
    )

    @property
    def turns(self) -> bool:
        return self.positions == "reindexed"


class StreamingLLM(RotaryVariant, EvictionVariant):
    """Attention to the first keys and the last ones of a sequence; no other is kept."""

    config_class = StreamingLLMConfig
    config: StreamingLLMConfig
    name = "streaming_llm"
    needs_groups = False
    splits_by_head = True

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"recent": 1 << 30}

    def rule(self, call: AttentionCall) -> SinkAndRecent | None:
        if call.mask.columns <= self.config.sinks + self.config.recent + 1:
            return None
        # A token's own key is among the last.
        return sink_and_recent(self.config.sinks, self.config.recent + 1, 1, call.key.device)

    def attended(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        return inner(self._reindexed(call)) if self.config.turns else super().attended(call, inner)

    def _reindexed(self, call: AttentionCall) -> AttentionCall:
        """Sinks meet the queries where these stand among the keys that they see. No stored key is turned."""
        sinks, last = self.config.sinks, self.config.sinks + self.config.recent
        if self.rotary is None or not self.rotary.is_rotated or call.mask.columns <= last + 1 or not sinks:
            return call
        self.refuse_others(call)
        places, by, keys = call.query_positions(), self.rotary.rotated_by(call), call.key_positions()
        query = self.rotary.turned(call.query, by, by + places.clamp(max=last) - places)
        is_sink = (keys >= 0) & (keys < sinks)
        return with_two_queries(call, query, is_sink, by='streaming_llm with positions="reindexed"')

    def forget(self, call: AttentionCall) -> None:
        config = self.config
        if call.mask.keys <= config.sinks + config.recent + config.slack:
            return
        sizes = {"sinks": config.sinks, "recent": config.recent, "slack": config.slack}
        keep_first_and_last(call, call.context, self.owner, **sizes)


register_variant(
    VariantInfo(
        name="streaming_llm",
        variant=StreamingLLM,
        title="Efficient Streaming Language Models with Attention Sinks",
        arxiv_id="2309.17453",
        year=2023,
        code="https://github.com/mit-han-lab/streaming-llm",
        summary="The kv cache keeps the first few keys and the last ones.",
        extra_parameters="none",
        needs_training=False,
        capabilities=CAPABILITIES,
        examples=(
            {"sinks": 2, "recent": 4, "slack": 4},
            {"sinks": 0, "recent": 3, "slack": 4},
            {"sinks": 2, "recent": 3, "slack": 4, "positions": "reindexed"},
        ),
    )
)
