"""MSWA: windows of other sizes in other heads and layers. Multi-Scale Window Attention, arXiv 2501.01039."""

from dataclasses import dataclass
from typing import Any

import torch

from patchattn_kernels import SinkAndRecent, sink_and_recent

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import VariantConfig, VariantInfo
from ...reading.selection import CAPABILITIES, SelectionVariant

_SCALES = (0.25, 0.5, 1.0, 2.0)


@dataclass(frozen=True, kw_only=True)
class MSWAConfig(VariantConfig):
    """Settings of MSWA."""

    window: int | None = option(
        1024,
        help="Keys of a window before it is scaled, a query's own among them; a multiple of 16. None: all keys.",
        source="ours; the paper's was not found",
        unit="keys",
        minimum=16,
    )
    by_head: bool = option(True, help="Scale windows by 1/4, 1/2, 1 and 2 over four groups of heads.", source="paper")
    drop_keys: bool = option(
        False,
        help="Have the kv cache drop keys that no later token reads: of each kv head those outside the largest window "
        "among its query heads.",
        source="paper: what is stored shrinks with the windows",
    )
    slack: int = option(
        32,
        help="With drop_keys, so many last tokens can be taken back exactly (assisted decoding); as many more keys are "
        "stored, hidden.",
        source="ours: transformers guesses 20 tokens at a time",
        unit="tokens",
        minimum=0,
    )
    by_layer: bool = option(True, help="Scale windows by 1/4, 1/2, 1 and 2 over four groups of layers.", source="paper")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None and self.window % 16:
            raise ValueError(f"window must be a multiple of 16, so that every scaled one is whole, got {self.window}.")


class MSWA(SelectionVariant):
    """Attention whose window grows from the first heads to the last, and from the first layers to the last."""

    config_class = MSWAConfig
    config: MSWAConfig
    needs_groups = True
    splits_by_head = True

    def __init__(self, config: MSWAConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        site.require("query_heads", by="MSWA")
        heads = site.heads_in_all[0] or 0
        of_layer = _scale(site.layer_index, site.layer_count) if config.by_layer else 1.0
        of_heads = [_scale(head, heads) if config.by_head else 1.0 for head in range(heads)]
        self.windows = site.of_own_heads([int((config.window or 0) * of_layer * of_head) for of_head in of_heads])

        self.owner = f"mswa(windows={self.windows}, slack={config.slack})"

    @property
    def keeps_state(self) -> bool:
        return self.config.drop_keys

    @property
    def batches_continuously(self) -> bool:
        return not self.keeps_state

    @property
    def is_identity(self) -> bool:
        return self.config.window is None

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"window": None}

    def select(self, call: AttentionCall) -> SinkAndRecent | None:
        if self.config.window is None or call.mask.columns <= min(self.windows):
            return None
        windows = self.windows if self.config.by_head else self.windows[:1]
        return sink_and_recent(0, windows, len(windows), call.query.device)

    def forget(self, call: AttentionCall) -> None:
        if not self.config.drop_keys or not call.context.claim(self.owner):
            return
        slack, kv_heads = self.config.slack, call.key.shape[1]
        group = len(self.windows) // kv_heads
        # Of the next token, whose own key is one of its window's.
        earlier = [max(self.windows[head * group : (head + 1) * group]) - 1 for head in range(kv_heads)]
        if call.mask.keys <= min(earlier) + slack:
            return
        order = call.mask.key_order()
        newest = order[..., : call.mask.keys - slack].amax(-1, keepdim=True)
        near = newest - order < torch.tensor(earlier, device=order.device)[:, None]
        kept = (call.mask.real_keys() & near).expand(len(call.key), kv_heads, -1)
        bound = earlier[0] if len(set(earlier)) == 1 else tuple(earlier)
        call.context.keep(self.owner, kept, bound=bound, slack=slack, since=slack)


def _scale(number: int, count: int) -> float:
    """That of the group of four that one of so many heads or layers is in."""
    return _SCALES[number * len(_SCALES) // count]


register_variant(
    VariantInfo(
        name="mswa",
        variant=MSWA,
        title="MSWA: Refining Local Attention with Multi-Scale Window Attention",
        arxiv_id="2501.01039",
        year=2025,
        summary="Every token reads a window before it, whose size differs between heads and layers.",
        extra_parameters="none",
        needs_training=True,
        capabilities=CAPABILITIES,
        examples=({"window": 16}, {"window": 16, "by_layer": False}),
    )
)
