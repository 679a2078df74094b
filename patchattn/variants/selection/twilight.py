"""Twilight: of the keys that another choice leaves, as few as hold a share of the attention. arXiv 2502.02770."""

from dataclasses import dataclass
from typing import Any

import torch

from ...core.call import AttentionCall
from ...core.keeping import of_query_heads
from ...core.places import Places
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import VariantInfo
from ...reading.choose import chosen_first, holding_share
from ...reading.groups import any_of_group, read_by_one
from ...reading.index import of_four_bits
from ...reading.pages import BoundedSelection, PagedConfig
from ...reading.scores import weights_with
from ...reading.selection import CAPABILITIES, narrowed
from ...reading.whole import refuse_some_keys


@dataclass(frozen=True, kw_only=True)
class TwilightConfig(PagedConfig):
    """Settings of Twilight."""

    top_p: float = option(
        0.95,
        help="Share of the estimated attention that is kept. 1: all.",
        source="paper, of LLaMA-2 and LLaMA-3; 0.85 in the released configurations, of LongChat",
        minimum=0.0,
        maximum=1.0,
    )
    budget: int | None = option(
        8192,
        help="Keys that are pruned, in whole pages with the highest bounds, as in Quest. None: all, or what a "
        "selection before this one leaves.",
        source="released code",
        unit="keys",
        minimum=1,
    )

    @property
    def looks_ahead(self) -> bool:
        return (self.top_p < 1.0 or self.budget is not None) and super().looks_ahead


class Twilight(BoundedSelection):
    """Attention to the keys with the largest estimated weights, as many as sum up to a share."""

    config_class = TwilightConfig
    config: TwilightConfig
    splits_by_head = True

    @property
    def reads_all(self) -> bool:
        return self.config.top_p == 1.0 and super().reads_all

    @property
    def keeps_state(self) -> bool:
        """Without pages nothing is remembered, so that it may come after any selection, whose choice it prunes."""
        return self.config.budget is not None

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"top_p": 1.0, **super().neutral_config()}

    def check(self, call: AttentionCall) -> None:
        if self.config.budget is None:
            refuse_some_keys(call, by=self.owner)
        else:
            super().check(call)

    def select(self, call: AttentionCall) -> torch.Tensor | Places | None:
        if self.is_dense(call):
            return None
        first, keys, groups = self.by_bounds(call, self.config.budget), call.key.shape[2], call.key.shape[1]
        if self.config.top_p == 1.0:
            return first
        if call.query.shape[2] > 1 or self.config.heads == "query":
            kept = self._kept(narrowed(call, first))
            if call.query.shape[2] == 1:
                return read_by_one(call, kept[:, :, 0], most=keys)
            return (
                of_query_heads(any_of_group(kept, groups), call.query.shape[1]) if self.config.heads == "kv" else kept
            )
        some, index = call, torch.arange(keys, device=call.key.device)
        if isinstance(first, Places):
            some, index = call.at(first), first.of_keys(keys).index
        order, counts = chosen_first(any_of_group(self._kept(some), groups)[:, :, 0], index.shape[-1])
        return Places(index.expand(order.shape).gather(-1, order), counts)

    def _kept(self, call: AttentionCall) -> torch.Tensor:
        """bool `(B, H, Tq, Tk)`: the keys whose weights, estimated with keys of four bits, hold the share."""
        return holding_share(weights_with(call, of_four_bits(call.key)), self.config.top_p)


register_variant(
    VariantInfo(
        name="twilight",
        variant=Twilight,
        title="Twilight: Adaptive Attention Sparsity with Hierarchical Top-p Pruning",
        arxiv_id="2502.02770",
        year=2025,
        code="https://github.com/tsinghua-ideal/Twilight",
        summary="A decoding token reads as few keys as hold a share of its attention, of the pages that matter most.",
        extra_parameters="none",
        needs_training=False,
        capabilities=CAPABILITIES,
        examples=(
            {"top_p": 0.6, "budget": 4, "page": 1, "prefill": "selected", "dense_layers": 0},
            {"top_p": 0.6, "budget": None, "heads": "query", "prefill": "selected", "dense_layers": 0},
        ),
    )
)
