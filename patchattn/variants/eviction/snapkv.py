"""SnapKV: what the end of a prompt attends to stays. Li et al., arXiv 2404.14469."""

from dataclasses import dataclass

from ...core.registry import register_variant
from ...core.variant import VariantInfo
from ...reading.eviction import CAPABILITIES
from ...reading.windows import WindowConfig, WindowEviction


@dataclass(frozen=True, kw_only=True)
class SnapKVConfig(WindowConfig):
    """Settings of SnapKV; every field is described by `patchattn info snapkv`."""


class SnapKV(WindowEviction):
    """Attention to what the last queries of a prompt attend to, pooled over neighbours, in each kv head."""

    config_class = SnapKVConfig
    name = "snapkv"
    default_budget = 2048
    splits_by_head = True


register_variant(
    VariantInfo(
        name="snapkv",
        variant=SnapKV,
        title="SnapKV: LLM Knows What You are Looking for Before Generation",
        arxiv_id="2404.14469",
        year=2024,
        code="https://github.com/FasterDecoding/SnapKV",
        summary="The kv cache keeps the keys of a prompt that its last queries attend to.",
        extra_parameters="none",
        needs_training=False,
        looks_ahead=True,
        capabilities=CAPABILITIES,
        examples=(
            {"budget": 6, "window": 2, "kernel": 3},
            {"budget": 5, "window": 3, "kernel": 3, "pooling": "mean", "group": "max", "event": "chunk"},
            {"compression_ratio": 0.4, "window": 6, "kernel": 1},
        ),
    )
)
