"""StreamingLLM's choice of keys as a mask: the first few and the last ones. arXiv 2309.17453."""

from dataclasses import dataclass
from typing import Any

from patchattn_kernels import SinkAndRecent, sink_and_recent

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import VariantConfig, VariantInfo
from ...reading.selection import CAPABILITIES, SelectionVariant


@dataclass(frozen=True, kw_only=True)
class StreamingConfig(VariantConfig):
    """Settings of streaming."""

    sinks: int = option(4, help="First keys of a text that every token reads.", source="paper", unit="keys", minimum=0)
    recent: int | None = option(
        2000,
        help="Last keys that a token reads, its own among them. None: all keys.",
        source="released code: recent_size of its example",
        unit="keys",
        minimum=1,
    )


class Streaming(SelectionVariant):
    """Attention to the first keys of a text and to the last ones; keys keep the positions that they have."""

    config_class = StreamingConfig
    config: StreamingConfig
    splits_by_head = True

    @property
    def keeps_state(self) -> bool:
        return self.config.sinks > 0  # a sliding cache then counts what it lets go of

    @property
    def batches_continuously(self) -> bool:
        return not self.keeps_state

    @property
    def is_identity(self) -> bool:
        return self.config.recent is None

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"recent": None}

    def select(self, call: AttentionCall) -> SinkAndRecent | None:
        sinks, recent = self.config.sinks, self.config.recent
        if recent is None or call.mask.columns <= sinks + recent:
            return None
        return sink_and_recent(sinks, recent, 1, call.query.device)


register_variant(
    VariantInfo(
        name="streaming",
        variant=Streaming,
        title="Efficient Streaming Language Models with Attention Sinks",
        arxiv_id="2309.17453",
        year=2023,
        code="https://github.com/mit-han-lab/streaming-llm",
        summary="Every token reads the first keys of the text and the last ones.",
        extra_parameters="none",
        needs_training=False,
        capabilities=CAPABILITIES,
        examples=({"sinks": 1, "recent": 3}, {"sinks": 0, "recent": 3}),
    )
)
