"""QK-norm, reached step by step: queries and keys are divided by a power of their norm. After arXiv 2010.04245."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.surroundings import LayerContext
from ...core.variant import Attend, AttentionOutput, Variant, VariantConfig, VariantInfo

_EPSILON = 1e-6  # of mean squares, as Qwen3 has it


@dataclass(frozen=True, kw_only=True)
class QKNormConfig(VariantConfig):
    """Settings of QK-norm; every field is described by `patchattn info qk_norm`."""

    exponent: float = option(
        0.0,
        help="Start of the exponents: at 0 queries and keys are left alone, at 1 only their direction is left.",
        source="ours, for pretrained models; models that are trained with such norms have 1",
        minimum=0.0,
        maximum=1.0,
    )
    learned: bool = option(
        True, help="Train the exponents, one per head of queries and of keys; False holds them.", source="ours"
    )
    initial_norm: float = option(
        1.0,
        help="Start of the norms, learned per head, that heads then have: root mean squares over channels.",
        source="models that are trained with such norms",
        minimum=1e-3,
        maximum=1e3,
    )


class QKNorm(Variant):
    """Attention with `q (g / rms(q))^p` for q and likewise k, with an exponent p and a norm g per head.

    Both are after rotary embedding, which keeps norms.
    """

    config_class = QKNormConfig
    config: QKNormConfig
    splits_by_head = True

    def __init__(self, config: QKNormConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        for stream, count in (("query", "query_heads"), ("key", "kv_heads")):
            heads = site.require(count, by="QK-norm")
            exponent = torch.full((heads,), float(config.exponent))
            setattr(self, f"{stream}_exponent", nn.Parameter(exponent) if config.learned else nn.Buffer(exponent))
            setattr(self, f"{stream}_norm", nn.Parameter(torch.full((heads,), float(config.initial_norm))))

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"exponent": 0.0}

    def fast_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        return inner(call.replace(query=self._scaled(call.query, "query")))

    def before_cache(
        self, key: torch.Tensor, value: torch.Tensor, context: LayerContext, visible: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._scaled(key, "key"), value

    def _scaled(self, states: torch.Tensor, stream: str) -> torch.Tensor:
        """`(B, heads, T, D)`, computed in float32 or wider."""
        exponent, norm = (getattr(self, f"{stream}_{name}") for name in ("exponent", "norm"))
        dtype = torch.promote_types(states.dtype, torch.float32)
        exponent, norm = (each.to(dtype)[:, None, None] for each in (exponent, norm))
        square = states.to(dtype).square().mean(-1, keepdim=True) + _EPSILON
        factor = (exponent * (norm.abs().clamp(min=_EPSILON).log() - square.log() / 2)).exp()
        return (states * factor).to(states.dtype)


register_variant(
    VariantInfo(
        name="qk_norm",
        variant=QKNorm,
        title="Query-Key Normalization for Transformers",
        arxiv_id="2010.04245",
        year=2020,
        summary="Queries and keys are divided by a learned power of their norm.",
        extra_parameters="two values per query head and per kv head and layer",
        needs_training=True,
        examples=({}, {"exponent": 1.0, "learned": False}),
    )
)
