"""StreamingLLM: the first keys and the last ones stay. Xiao et al., arXiv 2309.17453."""

from dataclasses import dataclass
from typing import Any

import torch

from patchattn_kernels import SinkAndRecent

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import VariantConfig, VariantInfo
from ...reading.eviction import CAPABILITIES, EvictionVariant


@dataclass(frozen=True, kw_only=True)
class StreamingLLMConfig(VariantConfig):
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


class StreamingLLM(EvictionVariant):
    """Attention to the first keys and the last ones of a sequence; no other is kept."""

    config_class = StreamingLLMConfig
    config: StreamingLLMConfig
    name = "streaming_llm"

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"recent": 1 << 30}

    def rule(self, call: AttentionCall) -> SinkAndRecent | None:
        if call.mask.columns <= self.config.sinks + self.config.recent + 1:
            return None
        sinks, recent = self.config.sinks, self.config.recent + 1  # a token's own key is among the last
        sizes = [torch.full((1,), size, dtype=torch.int32, device=call.key.device) for size in (sinks, recent)]
        return SinkAndRecent(sizes[0], sizes[1], sinks, None if sinks else recent)

    def forget(self, call: AttentionCall) -> None:
        config = self.config
        if call.mask.keys <= config.sinks + config.recent + config.slack:
            return
        order = call.mask.key_order()
        newest = order[..., : call.mask.keys - config.slack].amax(-1, keepdim=True)  # were all later ones taken back
        kept = call.mask.real_keys() & ((order <= config.sinks) | (newest - order < config.recent))
        kept = kept.expand(len(call.key), -1, -1)
        bound = config.sinks + config.recent
        call.context.keep(self.owner, kept, bound=bound, slack=config.slack, since=config.slack)


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
        examples=({"sinks": 2, "recent": 4, "slack": 4}, {"sinks": 0, "recent": 3, "slack": 4}),
    )
)
