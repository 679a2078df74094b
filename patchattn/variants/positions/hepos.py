"""Hepos: each head of cross attention reads every n-th token of the source. Huang et al., arXiv 2104.02112."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import ALL_CAPABILITIES, Attend, AttentionOutput, Variant, VariantConfig, VariantInfo


@dataclass(frozen=True, kw_only=True)
class HeposConfig(VariantConfig):
    """Settings of Hepos; every field is described by `patchattn info hepos`."""

    stride: int = option(
        4,
        help="Stride n: head h reads tokens j of the source with j mod n = h mod n. It divides the number of heads; 1 "
        "changes nothing.",
        source="paper; released code",
        unit="tokens",
        minimum=1,
        maximum=1 << 30,
    )


class Hepos(Variant):
    """Cross attention whose heads read every n-th token of the source, starting at different ones."""

    config_class = HeposConfig
    config: HeposConfig

    def __init__(self, config: HeposConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        heads = site.require("query_heads", by="Hepos")
        if heads % config.stride:
            raise ValueError(
                f"stride must divide the number of heads, so that as many read every token of the source; {site.name} "
                f"has {heads} heads, got stride={config.stride}."
            )

    @classmethod
    def fit(
        cls, config: HeposConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[HeposConfig, Sequence[AttentionSite]]:
        """Leave out what is not cross attention."""
        crossing = [site for site in sites if site.is_cross]
        if not crossing:
            raise NotImplementedError(
                "'hepos' does not support causal or bidirectional: it divides a source among the heads of cross "
                f"attention, and none of the chosen attention modules of {type(model).__name__} is one."
            )
        return config, crossing

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"stride": 1}

    @property
    def is_identity(self) -> bool:
        return self.config.stride == 1

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        number = call.mask.key_order() - 1  # without padding
        length = number[..., -1:] + 1
        stride = length.clamp(1, self.config.stride)  # so that no head is without a key
        head = torch.arange(call.query.shape[1], device=number.device)[:, None]
        return inner(call.seeing(number % stride == head % stride))


register_variant(
    VariantInfo(
        name="hepos",
        variant=Hepos,
        title="Efficient Attentions for Long Document Summarization",
        arxiv_id="2104.02112",
        year=2021,
        code="https://github.com/luyang-huang96/LongDocSum",
        summary="Each head of cross attention reads every n-th token of the source.",
        extra_parameters="none",
        needs_training=True,
        capabilities=ALL_CAPABILITIES - {"causal", "bidirectional"},
        examples=({"stride": 2}, {"stride": 4}),
    )
)
