"""HAT: tokens attend within segments, and segments by their first tokens. Chalkidis et al., arXiv 2210.05529."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...core.call import AttentionCall
from ...core.keeping import of_query_heads
from ...core.registry import register_variant
from ...core.selection import require_bidirectional
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import ALL_CAPABILITIES, Attend, AttentionOutput, Variant, VariantConfig, VariantInfo


@dataclass(frozen=True, kw_only=True)
class HATConfig(VariantConfig):
    """Settings of HAT; every field is described by `patchattn info hat`."""

    segment: int | None = option(
        128,
        help="K: length of a segment; its first token stands for it. None: the text is one segment, which changes "
        "nothing.",
        source="paper",
        unit="tokens",
        minimum=1,
        maximum=1 << 30,
    )
    every: int = option(
        1,
        help="In every so many layers, the last of them, the first tokens of segments attend to each other too.",
        source="ours: the paper's layers for them are of their own",
        unit="layers",
        minimum=1,
        maximum=1 << 30,
    )


class HAT(Variant):
    """Attention within segments of a fixed length and, in some layers, among their first tokens."""

    config_class = HATConfig
    config: HATConfig
    splits_by_head = True

    @classmethod
    def fit(
        cls, config: HATConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[HATConfig, Sequence[AttentionSite]]:
        """Leave out what is not bidirectional self-attention."""
        because = "the first token of a segment stands for what comes after it"
        return config, require_bidirectional(model, sites, by="'hat'", because=because)

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"segment": None}

    @property
    def is_identity(self) -> bool:
        return self.config.segment is None

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        size = self.config.segment
        if size is None:
            return inner(call)
        row = call.query_positions().clamp(min=0)[:, None, :, None]
        key = call.key_positions().clamp(min=0)[:, :, None]
        sees = row // size == key // size
        if (self.site.layer_index + 1) % self.config.every == 0:
            sees = sees | ((row % size == 0) & (key % size == 0))
        return inner(call.seeing(of_query_heads(sees, call.query.shape[1])))


register_variant(
    VariantInfo(
        name="hat",
        variant=HAT,
        title="An Exploration of Hierarchical Attention Transformers for Efficient Long Document Classification",
        arxiv_id="2210.05529",
        year=2022,
        code="https://github.com/coastalcph/hierarchical-transformers",
        summary="Tokens attend within their segment, and segments through their first tokens.",
        extra_parameters="none",
        needs_training=True,
        capabilities=ALL_CAPABILITIES - {"causal", "cross", "kv_cache", "static_cache"},
        examples=({"segment": 3}, {"segment": 2, "every": 2}),
    )
)
