"""NOSA: some blocks are chosen by the query, the others by their values alone, so that few change. arXiv 2510.13602."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ...core.call import AttentionCall
from ...core.places import Places
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import VariantInfo
from ...reading.choose import highest
from ...reading.compressed import CompressedConfig, CompressedSelection
from ...reading.groups import any_of_group
from ...reading.selection import CAPABILITIES
from ...reading.value_scores import value_scores

_SCORE, _LAST = "nosa", "last"


@dataclass(frozen=True, kw_only=True)
class NOSAConfig(CompressedConfig):
    """Settings of NOSA."""

    local: int = option(
        17,
        help="Last blocks that are always read, the token's own among them.",
        source="released code: its own and 16 before it",
        unit="blocks",
        minimum=1,
    )
    aware: int = option(
        33,
        help="Blocks that are always read or chosen by the query.",
        source="released code: 1, 16 and 16",
        unit="blocks",
        minimum=1,
    )
    top_k: int | None = option(
        64,
        help="Blocks that a token reads, those beyond `aware` chosen by their values. None: all.",
        source="released code",
        unit="blocks",
        minimum=1,
    )
    initial_std: float = option(
        0.02,
        help="Standard deviation of the projection's weights at the start.",
        source="ours",
        minimum=0.0,
        maximum=1.0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.first + self.local <= self.aware <= (self.aware if self.top_k is None else self.top_k):
            raise ValueError(
                f"The blocks that are always read, first={self.first} and local={self.local}, count among "
                f"aware={self.aware}, and these among top_k={self.top_k}: expected first + local <= aware <= top_k."
            )


class NOSA(CompressedSelection):
    """Attention to blocks of which a part is chosen by the query, and the rest by scores of values.

    The scores `A softplus(W v)` are also added to the logits of their keys; A starts at 0.
    """

    config_class = NOSAConfig
    config: NOSAConfig

    def __init__(self, config: NOSAConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        groups, width = (site.require(fact, by="NOSA") for fact in ("kv_heads", "head_dim"))
        self.weight = nn.Parameter(torch.empty(groups, groups * width).normal_(std=config.initial_std))
        self.scale = nn.Parameter(torch.zeros(groups))

    def fast_parameters(self) -> list[nn.Parameter]:
        return [self.scale]

    def key_facts(self, call: AttentionCall) -> Mapping[str, torch.Tensor]:
        return {_SCORE: value_scores(call, self.weight, self.scale, by="NOSA")}

    def key_bias(self, call: AttentionCall) -> torch.Tensor | None:
        return None if self.is_zero(self.scale) else call.key_fact(_SCORE)

    def select(self, call: AttentionCall) -> torch.Tensor | Places | None:
        config, top_k = self.config, self.config.top_k
        found = self.blocks(call, top_k)
        if top_k is None or found is None:
            return None
        visible, forced = found
        with torch.no_grad():
            by_query = self._highest(self.group_weights(call), visible.shape[-1], 0.0)
            aware = highest(by_query, visible, forced, config.aware)
            scores = self._highest(self._compressed_scores(call), visible.shape[-1], float("-inf"))
        lowest = torch.finfo(scores.dtype).min  # of blocks without a whole window, above those that are not seen
        blocks = highest(scores.clamp(min=lowest), visible, aware, top_k)
        if self.observers:
            self.report(call, hit_rate=self._hits(call, blocks))
        return self.of_pages(call, blocks, config.block, most=top_k)

    def _highest(self, windows: torch.Tensor, blocks: int, fill: float) -> torch.Tensor:
        """`(B, Hkv, Tq, P)` the highest of what is said of the windows that share keys with each block."""
        return self.by_stride(windows, blocks, fill).amax(dim=(-1, -2))

    def _compressed_scores(self, call: AttentionCall) -> torch.Tensor:
        """`(B, Hkv, Tq, W)` mean scores of the keys of windows, -inf of those that are not wholly seen."""
        score = call.key_fact(_SCORE).detach()
        means = score.unfold(-1, self.config.length, self.config.stride).mean(dim=-1)
        seen = any_of_group(self.seen_windows(call.mask, means.shape[-1]), call.key.shape[1])
        return torch.where(seen, means[:, :, None], float("-inf"))

    def _hits(self, call: AttentionCall, blocks: torch.Tensor) -> torch.Tensor:
        """`(B, Tq, Hkv)` what share of the blocks that each token reads the one before it has read; nan if none has."""
        state = call.context.sequence_state(self.owner)
        known = None if state is None else state.tensors.get(_LAST)
        before = torch.zeros_like(blocks[:, :, 0]) if known is None else known
        before = torch.nn.functional.pad(before, (0, blocks.shape[-1] - before.shape[-1]))
        earlier = torch.cat([before[:, :, None], blocks[:, :, :-1]], dim=2)
        if state is not None:
            state.write(_LAST, blocks[:, :, -1].clone())
        rate = (blocks & earlier).sum(dim=-1) / blocks.sum(dim=-1)
        return rate.where(earlier.any(dim=-1), float("nan")).transpose(1, 2)


register_variant(
    VariantInfo(
        name="nosa",
        variant=NOSA,
        title="NOSA: Native and Offloadable Sparse Attention",
        arxiv_id="2510.13602",
        year=2025,
        code="https://github.com/thunlp/NOSA",
        summary="Every token reads blocks of keys, some chosen by its query and the others by their values.",
        extra_parameters="the width of all values and one number per kv head and layer",
        needs_training=True,
        innermost=True,
        capabilities=CAPABILITIES - {"softcap"},
        examples=({"block": 1, "aware": 3, "top_k": 4, "local": 1, "length": 1, "stride": 1},),
    )
)
