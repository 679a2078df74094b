"""SSMax: logits grow with the log of the number of visible keys. Scalable-Softmax, arXiv 2501.19399."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from patchattn_kernels import scale_tokens

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import Attend, AttentionOutput, Variant, VariantConfig, VariantInfo
from ...surgery.folding import fold_factors


@dataclass(frozen=True, kw_only=True)
class SSMaxConfig(VariantConfig):
    """Settings of SSMax; every field is described by `patchattn info ssmax`."""

    initial_scale: float = option(
        0.0,
        help="Start of s, the factor of log n that is learned per query head.",
        source="ours: the identity",
        minimum=-100.0,
        maximum=100.0,
    )
    bias: bool = option(
        True,
        help="Add a learned b per query head, started at 1: logits times s log n + b.",
        source="ours, for pretrained models; the paper's main form has none",
    )


class SSMax(Variant):
    """Attention whose logits are multiplied by `s log n + b` per query head, where a query sees n keys."""

    config_class = SSMaxConfig
    config: SSMaxConfig
    splits_by_head = True

    def __init__(self, config: SSMaxConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        heads = site.require("query_heads", by="SSMax")
        if config.initial_scale == 0.0 and not config.bias:
            raise ValueError(
                "SSMax would start with all logits at 0: without a bias, give an initial_scale other than 0, or take "
                'preset="from_scratch".'
            )
        self.scale = nn.Parameter(torch.full((heads,), float(config.initial_scale)))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", nn.Parameter(torch.ones(heads)) if config.bias else None)

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"initial_scale": 0.0, "bias": True}

    def fast_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        factor = self.factor(call.mask.log_counts(torch.promote_types(self.scale.dtype, torch.float32)))
        scaled = call.replace(query=scale_tokens(call.query, factor))
        self.report(scaled, query_temperature=factor)
        return inner(scaled)

    def fold(self, plain: nn.Module) -> None:
        if self.scale.any() or self.bias is None:
            raise NotImplementedError("its logits grow with the number of keys: only s = 0 is a factor of queries")
        fold_factors(plain, self.site, "query", self.bias)

    def factor(self, log_counts: torch.Tensor) -> torch.Tensor:
        """Factor of the logits `(B or 1, T, H)` of tokens that see n keys, from log n in float32 at least.

        `log_counts` is `(B or 1, T)`, or `(B or 1, T, H)` under a mask per head.
        """
        scale, bias = self.scale, self.bias
        log_counts = log_counts if log_counts.dim() == 3 else log_counts.unsqueeze(-1)
        return scale * log_counts if bias is None else torch.addcmul(bias, scale, log_counts)


register_variant(
    VariantInfo(
        name="ssmax",
        variant=SSMax,
        title="Scalable-Softmax Is Superior for Attention",
        arxiv_id="2501.19399",
        year=2025,
        summary="Logits grow with the log of the number of visible keys, at a learned rate per head.",
        extra_parameters="two values per query head and layer",
        needs_training=True,
        presets={"from_scratch": {"initial_scale": 0.168, "bias": False}},
        examples=({}, {"initial_scale": 0.5, "bias": False}),
    )
)
