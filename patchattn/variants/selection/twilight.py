"""Twilight: of the keys that another choice leaves, as few as hold a share of the attention. arXiv 2502.02770."""

from dataclasses import dataclass
from typing import Any

import torch

from patchattn_kernels.rows import full_precision, row_logits

from ...core.call import AttentionCall
from ...core.keeping import of_query_heads
from ...core.places import Places
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import VariantInfo
from ...reading.pages import BoundedSelection, PagedConfig, any_of_group, chosen_first
from ...reading.selection import CAPABILITIES, narrowed
from ...reading.whole import refuse_some_keys

_STEPS = 15  # between the least and the greatest number of four bits


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
        self.check(call)
        if self.is_dense(call):
            return None
        first, keys, groups = self.by_bounds(call, self.config.budget), call.key.shape[2], call.key.shape[1]
        if self.config.top_p == 1.0:
            return first
        if call.query.shape[2] > 1 or self.config.heads == "query":
            kept = most_weights(estimated(narrowed(call, first)), self.config.top_p)
            if self.config.heads == "kv":
                kept = of_query_heads(any_of_group(kept, groups), call.query.shape[1])
            return kept
        some, index = call, torch.arange(keys, device=call.key.device)
        if isinstance(first, Places):
            some, index = call.at(first), first.of_keys(keys).index
        kept = any_of_group(most_weights(estimated(some), self.config.top_p), groups)[:, :, 0]
        order, counts = chosen_first(kept, kept.shape[-1])
        return Places(index.expand(order.shape).gather(-1, order), counts)


def estimated(call: AttentionCall) -> torch.Tensor:
    """`(B, H, Tq, Tk)` weights that are estimated with keys of four bits, 0 of what is not seen."""
    query, keys = full_precision(call.query), of_four_bits(call.key)
    return row_logits(query, keys, call.rule(), slice(0, query.shape[2])).softmax(dim=-1).nan_to_num(0.0)


def of_four_bits(keys: torch.Tensor) -> torch.Tensor:
    """`(B, Hkv, Tk, D)` keys as they are known by one of 16 even steps from each one's least to its greatest number."""
    keys = full_precision(keys)
    least, greatest = keys.aminmax(dim=-1, keepdim=True)
    step = (greatest - least) / _STEPS
    return least + ((keys - least) / torch.where(step > 0, step, 1.0)).round() * step


def most_weights(weights: torch.Tensor, share: float) -> torch.Tensor:
    """bool, as `(..., N)`: the largest weights, as few as sum up to a share of them, and those that equal the last."""
    ordered = weights.sort(dim=-1, descending=True).values
    before = ordered.cumsum(dim=-1) - ordered
    count = (before < share).sum(dim=-1, keepdim=True).clamp(min=1)
    return (weights >= ordered.gather(-1, count - 1)) & (weights > 0)


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
