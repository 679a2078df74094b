"""Attention bias: every head has a learned key and value of no token, which all queries see. arXiv 2402.17762."""

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
class AttentionBiasConfig(VariantConfig):
    """Settings of attention biases; every field is described by `patchattn info attention_bias`."""

    initial_std: float = option(
        0.02,
        help="Keys and values start as normal numbers of this standard deviation.",
        source="released code: 0.02",
        minimum=0.0,
        maximum=100.0,
    )
    logit: float = option(
        0.0,
        help="Added to the logit of the learned key. 0 is the paper, for models trained with it from the start; -5 is "
        "close to a pretrained model at the start; -1000 leaves attention as it is.",
        source="paper: none, as 0",
        minimum=_NONE,
        maximum=100.0,
    )


class AttentionBias(SlotVariant):
    """Attention `softmax([q k', q K]) [v'; V]`, k' and v' learned for each kv head, seen by every query."""

    config_class = AttentionBiasConfig
    config: AttentionBiasConfig
    needs_groups = True
    splits_by_head = True

    def __init__(self, config: AttentionBiasConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        self.query_heads = site.require("query_heads", by="attention_bias")
        shape = (site.require("kv_heads", by="attention_bias"), site.require("head_dim", by="attention_bias"))
        self.key = nn.Parameter(torch.randn(shape) * config.initial_std)
        self.value = nn.Parameter(torch.randn(shape) * config.initial_std)

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"logit": _NONE}

    @property
    def is_identity(self) -> bool:
        return self.config.logit == _NONE

    def fast_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def slots(self, call: AttentionCall) -> torch.Tensor:
        dtype = torch.promote_types(call.query.dtype, torch.float32)
        return torch.full((self.query_heads,), self.config.logit, dtype=dtype, device=call.query.device)

    def slot_key(self) -> torch.Tensor:
        return self.key[:, None]

    def slot_value(self) -> torch.Tensor:
        return self.value[:, None]


register_variant(
    VariantInfo(
        name="attention_bias",
        variant=AttentionBias,
        title="Massive Activations in Large Language Models",
        arxiv_id="2402.17762",
        year=2024,
        code="https://github.com/locuslab/massive-activations",
        summary="Every head has a learned key and value of no token, which all queries see.",
        extra_parameters="a key and a value per kv head and layer",
        needs_training=True,
        innermost=True,
        capabilities=ALL_CAPABILITIES - {"softcap"},
        examples=({}, {"logit": -3.0, "initial_std": 1.0}),
    )
)
