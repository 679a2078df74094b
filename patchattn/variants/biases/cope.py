"""CoPE: positions are counted by content, by gates of keys. Contextual Position Encoding, arXiv 2405.18719."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.selection import require_causal
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import ALL_CAPABILITIES, VariantConfig, VariantInfo
from ...softmax.rows import RowVariant


@dataclass(frozen=True, kw_only=True)
class CopeConfig(VariantConfig):
    """Settings of CoPE; every field is described by `patchattn info cope`."""

    positions: int = option(
        64,
        help="How many counts have an embedding; larger ones share the last. 0 leaves attention as it is.",
        source="paper: 64 in its language models",
        minimum=0,
    )
    scaled: bool = option(
        True,
        help="Multiply what positions add to logits by the factor of the logits; False adds it as it is.",
        source="released code",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions == 1:
            raise ValueError("positions=1 gives every key the same embedding, which changes nothing: give 2 or more.")


class Cope(RowVariant):
    """Attention with logits `s_ij + q_i e[p_ij]`, `p_ij` the sum of `sigmoid(s_il)` over the keys l from j to i.

    e is learned, zero at the start, and interpolated between whole numbers; heads of a layer share it. Queries and keys
    are those of attention, rotary embedding included.
    """

    config_class = CopeConfig
    config: CopeConfig
    splits_by_head = True

    def __init__(self, config: CopeConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        self.embedding = nn.Parameter(torch.zeros(config.positions, site.require("head_dim", by="CoPE")))

    @classmethod
    def fit(
        cls, config: CopeConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[CopeConfig, Sequence[AttentionSite]]:
        return config, require_causal(model, sites, by="CoPE", because="it counts from a token back to an earlier one")

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"positions": 0}

    @property
    def is_identity(self) -> bool:
        return not self.config.positions

    def fast_parameters(self) -> list[nn.Parameter]:
        return [self.embedding]

    def weights(self, logits: torch.Tensor, visible: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        if call.mask.index is not None:
            raise NotImplementedError(
                f"CoPE counts the keys between a token and an earlier one, and {self.site.name} is given only some of "
                "them: its kv cache has dropped keys, or another variant hands on a choice. Patch one of the two alone."
            )
        gates = logits.sigmoid() * visible
        place = gates.flip(-1).cumsum(-1).flip(-1).clamp(max=self.config.positions - 1)
        # In two dimensions: a product of more is split by whether it trains, which moves the last digit.
        query = call.query.to(logits.dtype)
        table = (query.flatten(0, 2) @ self.embedding.to(logits.dtype).mT).unflatten(0, query.shape[:-1])
        if self.config.scaled:
            table = table * call.scaling
        table = table.expand(len(logits), -1, -1, -1)
        below = place.detach().floor()
        share = place - below
        low, high = (table.gather(-1, number.long()) for number in (below, place.detach().ceil()))
        return (logits + torch.lerp(low, high, share)).softmax(-1)


register_variant(
    VariantInfo(
        name="cope",
        variant=Cope,
        title="Contextual Position Encoding: Learning to Count What's Important",
        arxiv_id="2405.18719",
        year=2024,
        code="https://github.com/facebookresearch/RAM/tree/main/projects/cope",
        summary="Positions are counted by content: a key is as far away as the gates between say.",
        extra_parameters="64 values per channel of a head and layer",
        needs_training=True,
        innermost=True,
        capabilities=ALL_CAPABILITIES - {"bidirectional", "cross", "softcap", "position_bias", "sinks"},
        examples=({"positions": 5},),
    )
)
