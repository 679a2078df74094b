"""URPE: attention weights are multiplied by a learned number of how far apart two tokens are. arXiv 2205.13401."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.selection import require_self
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.token_numbers import key_numbers, row_numbers
from ...core.variant import ALL_CAPABILITIES, VariantConfig, VariantInfo
from ...softmax.rows import RowVariant


@dataclass(frozen=True, kw_only=True)
class UrpeConfig(VariantConfig):
    """Settings of URPE; every field is described by `patchattn info urpe`."""

    span: int = option(
        128,
        help="How many tokens, itself counted, a learned number per distance and direction reaches; those further away "
        "share the last one. 0 leaves attention as it is.",
        source="ours; released code has one up to the greatest length, or 64 buckets up to 128",
        unit="tokens",
        minimum=0,
        maximum=1 << 20,
    )


class Urpe(RowVariant):
    """Attention with weights `softmax(s)_ij c[i - j]`, c per query head, 1 at the start; rows need not sum to 1."""

    config_class = UrpeConfig
    config: UrpeConfig
    splits_by_head = True

    def __init__(self, config: UrpeConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        heads = site.require("query_heads", by="URPE")
        self.table = nn.Parameter(torch.ones(heads, max(1, 2 * config.span - 1)))  # from the furthest token ahead on

    @classmethod
    def fit(
        cls, config: UrpeConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[UrpeConfig, Sequence[AttentionSite]]:
        return config, require_self(sites, by="URPE", because="tokens of two sequences are not apart by a number")

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"span": 0}

    @property
    def is_identity(self) -> bool:
        return not self.config.span

    def fast_parameters(self) -> list[nn.Parameter]:
        return [self.table]

    def weights(self, logits: torch.Tensor, visible: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        apart = row_numbers(call.mask)[:, :, None] - key_numbers(call.mask)[:, None]
        most = max(0, self.config.span - 1)
        factors = self.table.to(logits.dtype)[:, apart.clamp(-most, most) + most]  # (H, B or 1, R, Tk)
        return logits.softmax(-1) * factors.transpose(0, 1)


register_variant(
    VariantInfo(
        name="urpe",
        variant=Urpe,
        title="Your Transformer May Not be as Powerful as You Expect",
        arxiv_id="2205.13401",
        year=2022,
        code="https://github.com/lsj2408/URPE",
        summary="Attention weights are multiplied by a learned number of how far apart two tokens are.",
        extra_parameters="a value per distance, direction, query head and layer",
        needs_training=True,
        innermost=True,
        capabilities=ALL_CAPABILITIES - {"cross", "sinks"},
        examples=({"span": 4},),
    )
)
