"""Meta tokens: learned keys and values in front of the text, which all queries see. Hymba, arXiv 2411.13676."""

import math
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
class MetaTokensConfig(VariantConfig):
    """Settings of meta tokens; every field is described by `patchattn info meta_tokens`."""

    tokens: int = option(
        128,
        help="How many learned keys and values every kv head of a layer has.",
        source="released models: 128",
        unit="keys",
        minimum=1,
        maximum=4096,
    )
    initial_logit: float | None = option(
        -5.0,
        help="Start of a learned number per head, which is what all learned keys together weigh as long as they are "
        "small, as the logit of a sink: -5 is close to a pretrained model, and at -1000 nothing is seen of them. None: "
        "the paper's, whose keys weigh what their products with queries say.",
        source="ours, for pretrained models; the paper trains from scratch",
        minimum=_NONE,
        maximum=100.0,
    )
    initial_std: float = option(
        0.02,
        help="Keys and values start as normal numbers of this standard deviation.",
        source="ours, as most embeddings start",
        minimum=0.0,
        maximum=100.0,
    )


class MetaTokens(SlotVariant):
    """Attention `softmax([b_h - log m + q K', q K]) [V'; V]`, K' and V' m learned keys and values of each kv head.

    Keys are as they are stored: rotary embedding does not turn them, and the text keeps its positions.
    """

    config_class = MetaTokensConfig
    config: MetaTokensConfig
    needs_groups = True
    splits_by_head = True

    def __init__(self, config: MetaTokensConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        query_heads, kv_heads, width = (
            site.require(fact, by="meta_tokens") for fact in ("query_heads", "kv_heads", "head_dim")
        )
        self.key = nn.Parameter(torch.randn(kv_heads, config.tokens, width) * config.initial_std)
        self.value = nn.Parameter(torch.randn(kv_heads, config.tokens, width) * config.initial_std)
        start = config.initial_logit
        self.logit = None if start is None else nn.Parameter(torch.full((query_heads,), float(start)))

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"initial_logit": _NONE}

    @property
    def is_identity(self) -> bool:
        return self.config.initial_logit == _NONE

    def fast_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def slots(self, call: AttentionCall) -> torch.Tensor:
        if self.logit is None:
            return torch.zeros(call.query.shape[1], device=call.query.device)
        return self.logit.to(torch.promote_types(self.logit.dtype, torch.float32)) - math.log(self.config.tokens)

    def slot_key(self) -> torch.Tensor:
        return self.key

    def slot_value(self) -> torch.Tensor:
        return self.value


register_variant(
    VariantInfo(
        name="meta_tokens",
        variant=MetaTokens,
        title="Hymba: A Hybrid-head Architecture for Small Language Models",
        arxiv_id="2411.13676",
        year=2024,
        code="https://github.com/NVlabs/hymba",
        summary="Learned keys and values stand in front of the text, which all queries see.",
        extra_parameters="so many keys and values per kv head and layer, and one value per query head",
        needs_training=True,
        innermost=True,
        capabilities=ALL_CAPABILITIES - {"softcap"},
        presets={"paper": {"tokens": 128, "initial_logit": None}},
        examples=({"tokens": 3, "initial_logit": 0.0}, {"tokens": 2, "initial_logit": None}),
    )
)
