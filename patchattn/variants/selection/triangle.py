"""TriangleMix: the last tokens of a prompt read all keys, those before them sinks and recent ones. arXiv 2507.21526."""

from dataclasses import dataclass
from typing import Any

import torch

from patchattn_kernels import sink_and_recent

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import VariantConfig, VariantInfo
from ...reading.lines import texts_of
from ...reading.selection import CAPABILITIES, SelectionVariant, Split, plain_own


@dataclass(frozen=True, kw_only=True)
class TriangleConfig(VariantConfig):
    """Settings of TriangleMix."""

    last: int | None = option(
        128,
        help="Last tokens of a call that read all keys. None: all of them.",
        source="released code, of Llama-3.1-8B",
        unit="tokens",
        minimum=0,
    )
    sinks: int = option(
        8,
        help="First keys of a text that the others read.",
        source="released code, of Llama-3.1-8B",
        unit="keys",
        minimum=0,
    )
    recent: int = option(
        512,
        help="Last keys that the others read, a token's own among them.",
        source="released code, of Llama-3.1-8B",
        unit="keys",
        minimum=1,
    )
    dense_layers: int | None = option(
        None,
        help="First layers that stay dense. None: half of them.",
        source="released code: 16 of the 32 layers of Llama-3.1-8B",
        unit="layers",
        minimum=0,
    )


class Triangle(SelectionVariant):
    """Attention of a prompt to sinks and recent keys, but for its last tokens."""

    config_class = TriangleConfig
    config: TriangleConfig
    splits_by_head = True

    @property
    def keeps_state(self) -> bool:
        return self.config.sinks > 0  # a sliding cache then counts what it lets go of

    @property
    def is_identity(self) -> bool:
        dense = self.site.layer_count // 2 if self.config.dense_layers is None else self.config.dense_layers
        return self.config.last is None or self.site.layer_index < dense

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"last": None}

    def select(self, call: AttentionCall) -> torch.Tensor | Split | None:
        last, sinks, recent = self.config.last, self.config.sinks, self.config.recent
        if last is None or call.decodes or call.mask.queries <= last or call.mask.columns <= sinks + recent:
            return None
        first = sink_and_recent(sinks, recent, 1, call.query.device)
        if plain_own(call.mask) is not None:
            return Split(call.mask.queries - last, first)
        is_last = texts_of(call.mask).behind_rows < last
        return call.seeing(first).mask.seen() | is_last[:, None, :, None]


register_variant(
    VariantInfo(
        name="triangle",
        variant=Triangle,
        title="TriangleMix: Accelerating Prefilling via Decoding-time Contribution Sparsity",
        arxiv_id="2507.21526",
        year=2025,
        code="https://github.com/microsoft/MInference",
        summary="The last tokens of a prompt read all keys, those before them the first keys and recent ones.",
        extra_parameters="none",
        needs_training=False,
        looks_ahead=True,
        capabilities=CAPABILITIES,
        examples=({"last": 1, "sinks": 1, "recent": 2, "dense_layers": 0},),
    )
)
