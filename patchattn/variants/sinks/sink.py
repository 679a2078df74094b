"""Sink: every head has a learned logit that takes attention and gives nothing. GPT-OSS, arXiv 2508.10925."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import ALL_CAPABILITIES, VariantConfig, VariantInfo
from ...softmax.slots import SlotVariant

_NONE = -1000.0  # its exponential is 0 beside that of any logit of a model


@dataclass(frozen=True, kw_only=True)
class SinkConfig(VariantConfig):
    """Settings of sink; every field is described by `patchattn info sink`."""

    initial_logit: float = option(
        -5.0,
        help="Start of every head's sink logit. 0 is off-by-one attention; the lower, the closer to plain softmax, "
        "which it is at -1000.",
        source="ours, for pretrained models; off-by-one attention has 0, and models with sinks are trained with them",
        minimum=_NONE,
        maximum=100.0,
    )
    learned: bool = option(
        True, help="Train the logits; False holds them fixed, as off-by-one attention does.", source="GPT-OSS"
    )


class Sink(SlotVariant):
    """Attention `softmax([b, s])` without its first weight, b a logit per query head: rows may sum to less than 1."""

    config_class = SinkConfig
    config: SinkConfig
    splits_by_head = True

    def __init__(self, config: SinkConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        heads = site.require("query_heads", by="sink")
        start = torch.full((heads,), float(config.initial_logit))
        self.logit = nn.Parameter(start) if config.learned else nn.Buffer(start)

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"initial_logit": _NONE, "learned": False}

    @property
    def is_identity(self) -> bool:
        return not self.config.learned and self.config.initial_logit == _NONE

    def fast_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def slots(self, call: AttentionCall) -> torch.Tensor:
        return self.logit

    @torch.no_grad()
    def fold(self, plain: nn.Module) -> None:
        """Two sinks of a head are one, whose exponential is the sum of theirs."""
        module = plain.get_submodule(self.site.name)
        own = module._parameters.get("sinks")
        if own is None:
            raise NotImplementedError(
                f"{self.site.module_class} has no sinks of its own to join it to, as GPT-OSS's attention has"
            )
        joined = torch.logaddexp(own.double(), self.logit.to(own.device).double()).to(own.dtype)
        module._parameters["sinks"] = nn.Parameter(joined, requires_grad=own.requires_grad)


register_variant(
    VariantInfo(
        name="sink",
        variant=Sink,
        title="gpt-oss-120b & gpt-oss-20b Model Card",
        arxiv_id="2508.10925",
        year=2025,
        code="https://github.com/openai/gpt-oss",
        summary="Every head has a learned logit in its softmax that takes attention and gives nothing.",
        extra_parameters="one value per query head and layer",
        needs_training=True,
        innermost=True,
        capabilities=ALL_CAPABILITIES - {"softcap"},
        presets={"off_by_one": {"initial_logit": 0.0, "learned": False}},
        examples=({},),
    )
)
