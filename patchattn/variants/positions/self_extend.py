"""Self-Extend: far tokens stand at grouped positions. Jin et al., arXiv 2401.01325."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ...core.call import AttentionCall
from ...core.keeping import of_query_heads
from ...core.registry import register_variant
from ...core.selection import require_causal
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import ALL_CAPABILITIES, Attend, AttentionOutput, VariantInfo
from ...positions.rotary import ROTATED_BY
from ...positions.variant import RotaryConfig, RotaryVariant
from ...softmax.merging import merged


@dataclass(frozen=True, kw_only=True)
class SelfExtendConfig(RotaryConfig):
    """Settings of Self-Extend; every field is described by `patchattn info self_extend`."""

    group: int = option(
        8,
        help="So many neighbouring positions of far tokens become one. 1 changes nothing.",
        source="released code",
        unit="positions",
        minimum=1,
        maximum=1 << 30,
    )
    window: int = option(
        1024,
        help="Keys less than so many positions away stay where they are.",
        source="released code",
        unit="positions",
        minimum=1,
        maximum=1 << 30,
    )


class SelfExtend(RotaryVariant):
    """Attention to near keys at their positions, and to far ones at positions divided by the size of a group."""

    config_class = SelfExtendConfig
    config: SelfExtendConfig
    name = "self_extend"
    splits_by_head = True
    needs_rotation = True

    @classmethod
    def fit(
        cls, config: SelfExtendConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[SelfExtendConfig, Sequence[AttentionSite]]:
        """Leave out what is not causal self-attention, and layers that rotate nothing."""
        because = "near and far are told by where a token stands in its own text"
        causal = require_causal(model, sites, by=f"'{cls.name}'", because=because)
        if config.group == 1:
            return replace(config, rotary=None), causal
        return super().fit(config, model, causal)

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"group": 1}

    @property
    def is_identity(self) -> bool:
        return self.config.group == 1

    @property
    def keeps_state(self) -> bool:
        return True

    def key_facts(self, call: AttentionCall) -> Mapping[str, torch.Tensor]:
        return self.rotated_by(call)

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        group, window = self.config.group, self.config.window
        if self.rotary is None or call.mask.columns <= window:
            return inner(call)
        row, key = call.query_positions(), call.key_positions()
        is_near = of_query_heads(row[:, None, :, None] - key[:, :, None] < window, call.query.shape[1])
        grouped_row = row.div(group, rounding_mode="floor") + window - window // group
        grouped_key = key.div(group, rounding_mode="floor")
        far = call.replace(
            query=self.rotary.turned(call.query, self.rotary.rotated_by(call), grouped_row),
            key=self.rotary.turned(call.key, call.key_fact(ROTATED_BY), grouped_key),
        )
        return merged(call.seeing(is_near), far.seeing(~is_near))


register_variant(
    VariantInfo(
        name="self_extend",
        variant=SelfExtend,
        title="LLM Maybe LongLM: Self-Extend LLM Context Window Without Tuning",
        arxiv_id="2401.01325",
        year=2024,
        code="https://github.com/datamllab/LongLM",
        summary="Keys beyond a window stand at positions divided by the size of a group.",
        extra_parameters="none",
        needs_training=False,
        innermost=True,
        capabilities=ALL_CAPABILITIES - {"bidirectional", "cross", "position_bias"},
        examples=({"group": 2, "window": 3},),
    )
)
