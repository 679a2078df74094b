"""DuoAttention: some kv heads keep all keys, the others the first and the last ones. Xiao et al., arXiv 2410.10819."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from patchattn_kernels import SinkAndRecent, sink_and_recent

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import VariantConfig, VariantInfo
from ...reading.eviction import CAPABILITIES, EvictionVariant, keep_first_and_last
from ...reading.gates import Gates, HeadGates

_MAY_BE_GUESSES = (
    "attends to more in a prompt than behind it, and what it was just given may hold guesses that are taken back: no "
    'assisted decoding, and no crop before the next call, under prefill="full" or with prefill_recent.'
)


@dataclass(frozen=True, kw_only=True)
class DuoConfig(VariantConfig):
    """Settings of DuoAttention; every field is described by `patchattn info duo`."""

    gates: Gates | None = option(
        None,
        parse=lambda given: HeadGates.parse(given).to_dict(),  # a saved patch holds them, not the name of a file
        help="Gates of the kv heads: a file that `patchattn calibrate duo` writes, a released "
        "full_attention_heads.tsv, or per layer a list of numbers from 0 to 1. They must be given.",
        source="paper: learned",
    )
    sparsity: float = option(
        0.5,
        help="Share of the model's kv heads, those with the lowest gates, that keep only the first and the last keys.",
        source="paper: 0.5 of grouped heads, 0.75 without groups",
        minimum=0.0,
        maximum=1.0,
    )
    sinks: int = option(
        64,
        help="First real keys of a sequence, which stay in these heads.",
        source="released code: its examples",
        unit="keys",
        minimum=0,
        maximum=1 << 30,
    )
    recent: int = option(
        256,
        help="Last real keys that stay in these heads behind a token; the next one sees them and its own.",
        source="released code: its examples",
        unit="keys",
        minimum=1,
        maximum=1 << 30,
    )
    prefill: Literal["streaming", "full"] = option(
        "streaming",
        help="What these heads see in the first call on a kv cache, or without one: the first and the last keys, as in "
        "every later call (streaming), or everything (full).",
        source="ours: as gates are learned, and exact however a prompt is cut; released code: full",
        choices=("streaming", "full"),
    )
    prefill_recent: int | None = option(
        None,
        help="Last real keys that tokens of calls with several see in these heads; they stay until a single token "
        "comes. None: as many as recent.",
        source="LServe: 8192 (preset=lserve)",
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefill_recent is None:
            return
        if self.prefill == "full":
            raise ValueError(f'prefill="full" sees everything: leave out prefill_recent, got {self.prefill_recent}.')
        if self.prefill_recent < self.recent:
            raise ValueError(
                f"prefill_recent must be at least recent, {self.recent}, got {self.prefill_recent}: what a call of "
                "several tokens does not see is dropped."
            )

    @property
    def looks_ahead(self) -> bool:
        return self.prefill == "full" or self.prefill_recent is not None


class Duo(EvictionVariant):
    """Attention some of whose kv heads see and keep the first keys and the last ones, the others all.

    The keys of the two sorts are stored apart, since their numbers differ.
    """

    config_class = DuoConfig
    config: DuoConfig
    name = "duo"
    splits_by_head = True

    def __init__(self, config: DuoConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        heads, kv_heads = (site.require(count, by="duo") for count in ("query_heads", "kv_heads"))
        self.streaming: tuple[int, ...] = ()
        if config.gates is not None:
            lowest = HeadGates.parse(config.gates).lowest(config.sparsity)
            self.streaming = site.own_heads(lowest[site.layer_index], kv=True)
        self.is_split = 0 < len(self.streaming) < kv_heads
        limits = {
            "sinks": config.sinks,
            "recent": config.recent,
            "prefill": config.prefill,
            **({} if config.prefill_recent is None else {"prefill_recent": config.prefill_recent}),
            "slack": config.slack,
            "streaming": list(self.streaming),
        }
        self.owner = f"duo({', '.join(f'{name}={value}' for name, value in limits.items())})"
        self.streams = [head // (heads // kv_heads) in self.streaming for head in range(heads)]

    @classmethod
    def fit(
        cls, config: DuoConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[DuoConfig, Sequence[AttentionSite]]:
        if config.gates is None:
            raise ValueError(
                "duo needs gates=...: the file that `patchattn calibrate duo` writes, or per layer a number for each "
                "kv head."
            )
        config, own = super().fit(config, model, sites)
        HeadGates.parse(config.gates).check(model, own)
        return config, own

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"sparsity": 0.0}

    @property
    def is_identity(self) -> bool:
        return self.config.sparsity == 0.0  # a layer without streaming heads still appends in place

    def rule(self, call: AttentionCall) -> SinkAndRecent | None:
        config, is_first = self.config, call.mask.queries == call.mask.columns
        near = self._recent(call) + 1  # a token's own is among the last
        if not self.streaming or call.mask.columns < config.sinks + near + 1:
            return None
        if is_first and config.prefill == "full":
            return None
        if self.is_split and _is_whole(call):
            recent = [near if streams else None for streams in self.streams]
            return sink_and_recent(config.sinks, recent, len(recent), call.key.device)
        if self.is_split and not call.context.is_apart:
            return None
        return sink_and_recent(config.sinks, near, 1, call.key.device)

    def _recent(self, call: AttentionCall) -> int:
        config = self.config
        return config.recent if config.prefill_recent is None or call.mask.queries == 1 else config.prefill_recent

    def forget(self, call: AttentionCall) -> None:
        if not self.streaming:
            return
        config, context, recent = self.config, call.context, self._recent(call)
        is_whole = _is_whole(call)
        if config.looks_ahead and not context.is_apart:
            self._settle(call)
        if call.mask.keys <= config.sinks + recent + config.slack or (not is_whole and not context.is_apart):
            return
        if self.is_split and is_whole:
            context.set_apart(self.owner, self.streaming)
            context = replace(context, is_apart=True)
        # Behind a prompt whose end saw more, nothing was right to drop before.
        since = 0 if config.prefill_recent is not None and call.mask.queries == 1 else None
        sizes = {"sinks": config.sinks, "recent": recent, "slack": config.slack}
        keep_first_and_last(call, context, self.owner, **sizes, since=since)

    def _settle(self, call: AttentionCall) -> None:
        """Nothing may be taken back between a call that saw more than the next ones do and the next."""
        state = call.context.sequence_state(self.owner)
        if state is None:
            return
        config, mask = self.config, call.mask
        sees_more = mask.queries > 1 and (config.prefill_recent is not None or mask.queries == mask.columns)
        sees_more = sees_more and mask.columns > config.sinks + config.recent + 1
        state.settled = _MAY_BE_GUESSES if sees_more else None


def _is_whole(call: AttentionCall) -> bool:
    """Whether it is about all heads of its module, none of whose keys are apart."""
    return call.query.shape[1] == call.site.query_heads


register_variant(
    VariantInfo(
        name="duo",
        variant=Duo,
        title="DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
        arxiv_id="2410.10819",
        year=2024,
        code="https://github.com/mit-han-lab/duo-attention",
        summary="Some kv heads keep all keys, the others only the first and the last ones.",
        extra_parameters="none",
        needs_training=False,
        capabilities=CAPABILITIES,
        presets={"lserve": {"sparsity": 0.5, "sinks": 128, "recent": 256, "prefill_recent": 8192}},
        examples=(
            {"gates": [[0.9, 0.1], [0.8, 0.2]], "sinks": 2, "recent": 4, "slack": 4},
            {"gates": [[0.9, 0.1], [0.2, 0.3]], "sparsity": 0.75, "sinks": 1, "recent": 3, "slack": 4},
            {"gates": [[0.3, 0.7], [0.2, 0.9]], "sinks": 1, "recent": 4, "slack": 3, "prefill": "full"},
        ),
    )
)
