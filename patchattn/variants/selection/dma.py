"""DMA, trainable dynamic mask attention: keys are chosen, and biased, by what is in their values. arXiv 2508.02124."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ...core.call import AttentionCall
from ...core.keeping import of_query_heads
from ...core.places import Places
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import VariantConfig, VariantInfo
from ...reading.forced import visible_pages
from ...reading.groups import read_by_one
from ...reading.selection import CAPABILITIES, SelectionVariant
from ...reading.value_scores import value_scores

_SCORE = "dma"


@dataclass(frozen=True, kw_only=True)
class DMAConfig(VariantConfig):
    """Settings of DMA."""

    window: int | None = option(
        2048,
        help="Keys that a token reads in each kv head; with blocks less than twice as many. None: all.",
        source="released code: Doge",
        unit="keys",
        minimum=1,
    )
    choice: Literal["top", "relu"] = option(
        "top",
        help="The keys that are read: 'top', the `window` highest scores; 'relu', all with a score above 0, and the "
        "token's own.",
        source="released code: Doge; 'relu' is a mode of flash-dmattn",
        choices=("top", "relu"),
    )
    block: int = option(
        1,
        help="Keys of a block, which is read whole if more than half of the keys that a token sees of it were chosen, "
        "and not at all otherwise; the token's own key is read anyhow. 1: no blocks.",
        source="released code: an option of flash-dmattn",
        unit="keys",
        minimum=1,
    )
    bias: Literal["exp", "plain"] = option(
        "exp",
        help="What is added to the logits of a key with score b: exp(b) - 1, or b itself.",
        source="paper and Doge; 'plain' is flash-dmattn, which leaves exp out for stability",
        choices=("exp", "plain"),
    )
    initial_std: float = option(
        0.02,
        help="Standard deviation of the projection's weights at the start.",
        source="released code: Doge",
        minimum=0.0,
        maximum=1.0,
    )


class DMA(SelectionVariant):
    """Attention to the visible keys with the highest scores `A softplus(W v)`, which are added to their logits.

    v are the values of a token in all kv heads; a kv head has one row of W and one number of A, which starts at 0. Of
    equal scores the later key is read, so that an untrained one is a sliding window.
    """

    config_class = DMAConfig
    config: DMAConfig
    needs_groups = True

    def __init__(self, config: DMAConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        groups, width = (site.require(fact, by="DMA") for fact in ("kv_heads", "head_dim"))
        self.weight = nn.Parameter(torch.empty(groups, groups * width).normal_(std=config.initial_std))
        self.scale = nn.Parameter(torch.zeros(groups))

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"window": None}

    def fast_parameters(self) -> list[nn.Parameter]:
        return [self.scale]

    def key_facts(self, call: AttentionCall) -> Mapping[str, torch.Tensor]:
        return {_SCORE: value_scores(call, self.weight, self.scale, by="DMA")}

    def select(self, call: AttentionCall) -> torch.Tensor | Places | None:
        config, score = self.config, call.key_fact(_SCORE).detach()
        if config.window is None or (config.choice == "top" and call.mask.columns <= config.window):
            return None
        seen = call.mask.seen()
        if seen.shape[1] > 1:  # a mask by query head
            score = of_query_heads(score, call.query.shape[1])
        kept = _latest_highest(score, seen, config.window) if config.choice == "top" else (score > 0)[:, :, None] & seen
        if config.block > 1:
            kept = _by_majority(kept, seen, call.key_positions(), config.block)
        if config.block > 1 or config.choice == "relu":
            kept = kept | visible_pages(call.mask, 1)[1]
        if call.query.shape[2] == 1:
            most = kept.shape[-1]  # with a majority of each block that is read, less than twice the window
            if config.choice == "top":
                most = min(most, config.window if config.block == 1 else 2 * config.window + 1)
            return read_by_one(call, kept[:, :, 0], most=most)
        return of_query_heads(kept, call.query.shape[1])

    def key_bias(self, call: AttentionCall) -> torch.Tensor | None:
        if self.is_zero(self.scale):
            return None
        score = call.key_fact(_SCORE)
        return score.expm1() if self.config.bias == "exp" else score


def _latest_highest(score: torch.Tensor, seen: torch.Tensor, count: int) -> torch.Tensor:
    """bool `(B, h, Tq, Tk)`: of the keys that queries see those with the highest scores, of equal ones the later.

    Args:
        score: `(B, h, Tk)`.
        seen: bool `(B or 1, 1 or h, Tq, Tk)`.
        count: how many.
    """
    order = score.shape[-1] - 1 - score.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    batch = max(len(seen), len(score))
    order = order[:, :, None].expand(batch, -1, seen.shape[2], -1)
    ordered = seen.expand(order.shape).gather(-1, order)
    ordered &= ordered.cumsum(dim=-1, dtype=torch.int32) <= count
    return torch.zeros_like(ordered).scatter(-1, order, ordered)


def _by_majority(kept: torch.Tensor, seen: torch.Tensor, place: torch.Tensor, block: int) -> torch.Tensor:
    """bool `(B, h, Tq, Tk)`: all keys that are seen of blocks of which more than half of them are kept.

    Args:
        kept: bool `(B, h, Tq, Tk)`.
        seen: bool `(B or 1, 1 or h, Tq, Tk)`; of several texts in a row a query sees one.
        place: `(B or 1, 1 or Hkv, Tk)` where each key stands in its text.
        block: keys of a block, counted from the start of each text.
    """
    seen = seen.expand(kept.shape)
    number = of_query_heads(_ranks(place.clamp(min=0) // block), kept.shape[1])[:, :, None].expand(kept.shape)
    chosen, there = (
        torch.zeros_like(kept, dtype=torch.int32).scatter_add(-1, number, each.int()) for each in (kept, seen)
    )
    return (2 * chosen > there).gather(-1, number) & seen


def _ranks(numbers: torch.Tensor) -> torch.Tensor:
    """`(..., N)` the rank of each number among the different ones of its row: below N, as many as a cache forgot."""
    ordered = numbers.sort(dim=-1)
    ranks = F.pad(ordered.values.diff(dim=-1) > 0, (1, 0)).cumsum(dim=-1)
    return torch.zeros_like(numbers).scatter(-1, ordered.indices, ranks)


register_variant(
    VariantInfo(
        name="dma",
        variant=DMA,
        title="Trainable Dynamic Mask Sparse Attention",
        arxiv_id="2508.02124",
        year=2025,
        code="https://github.com/SmallDoges/flash-dmattn",
        summary="Every token reads the keys whose values score highest, with the scores on their logits.",
        extra_parameters="the width of all values and one number per kv head and layer",
        needs_training=True,
        innermost=True,
        capabilities=CAPABILITIES - {"softcap"},
        presets={"flash-dmattn": {"bias": "plain"}},
        examples=({"window": 3}, {"window": 3, "bias": "plain", "block": 2}, {"choice": "relu"}),
    )
)
