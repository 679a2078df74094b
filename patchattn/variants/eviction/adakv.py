"""AdaKV: the heads of a layer share one budget. Feng et al., arXiv 2407.11550."""

from dataclasses import dataclass

import torch

from ...cache.state import SequenceState
from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import VariantInfo
from ...reading.budgets import best
from ...reading.eviction import CAPABILITIES
from ...reading.windows import WindowConfig, WindowEviction


@dataclass(frozen=True, kw_only=True)
class AdaKVConfig(WindowConfig):
    """Settings of AdaKV; every field is described by `patchattn info adakv`."""

    floor: float = option(
        0.2,
        help="Share of its even part of the budget that every kv head has in any case; at 1 this is SnapKV.",
        source="released code: its scripts",
        minimum=0.0,
        maximum=1.0,
    )


class AdaKV(WindowEviction):
    """Attention to what the last queries of a prompt attend to; heads whose scores are higher keep more keys."""

    config_class = AdaKVConfig
    config: AdaKVConfig
    name = "adakv"
    default_budget = 2048

    def __init__(self, config: AdaKVConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        if isinstance(config.budget, tuple) and any(isinstance(each, list) for each in config.budget):
            raise ValueError(
                f"AdaKV shares the budget of a layer out over its heads, got {config.budget} for each head."
            )

    def chosen(self, call: AttentionCall, state: SequenceState) -> torch.Tensor:
        scores, window = self.scores(call, state), self.config.window
        real = call.mask.real_keys().expand_as(scores)
        order = real.long().cumsum(-1)
        held, total = order[..., -1:], self.counts(call)
        even = (total - window).clamp(min=0)  # of each head, besides the window
        outside = real & (held - order >= window)
        heads = scores.shape[1]
        of_layer = best(_in_one_row(scores), _in_one_row(outside), heads * even)
        own = of_layer.unflatten(-1, (-1, heads)).transpose(1, 3).squeeze(-1).sum(-1, keepdim=True)
        floor = self.config.floor
        share = ((1.0 - floor) * own.double() + (floor * even.double()).floor()).round().long()
        counts = torch.where(even > 0, share + window, total)
        return best(scores, real, torch.where(held <= total, held, counts), window)

    def bound(self, columns: int) -> int | None:
        return None  # which head keeps most is for the scores to say


def _in_one_row(tensor: torch.Tensor) -> torch.Tensor:
    """`(B, 1, Tk * Hkv)` of `(B, Hkv, Tk)`, by keys, so that of equal scores an earlier key comes first."""
    return tensor.transpose(1, 2).flatten(1)[:, None]


register_variant(
    VariantInfo(
        name="adakv",
        variant=AdaKV,
        title="Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference",
        arxiv_id="2407.11550",
        year=2024,
        code="https://github.com/FFY0/AdaKV",
        summary="The kv cache keeps the keys that a prompt's last queries attend to, more of them in some heads.",
        extra_parameters="none",
        needs_training=False,
        looks_ahead=True,
        capabilities=CAPABILITIES,
        examples=(
            {"budget": 5, "window": 2, "kernel": 3},
            {"compression_ratio": 0.4, "window": 3, "floor": 0.0, "event": "chunk"},
        ),
    )
)
