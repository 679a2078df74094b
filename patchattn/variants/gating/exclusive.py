"""Exclusive self-attention: what heads give along their token's own value is taken away. arXiv 2603.09078."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...core import ranks
from ...core.call import AttentionCall
from ...core.registry import register_variant
from ...core.selection import require_self
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import ALL_CAPABILITIES, Attend, AttentionOutput, Variant, VariantConfig, VariantInfo


@dataclass(frozen=True, kw_only=True)
class ExclusiveConfig(VariantConfig):
    """Settings of exclusive self-attention; every field is described by `patchattn info exclusive`."""

    learned: bool = option(
        True,
        help="Learn which share is taken away, per head, from 0: exactly the model. False takes all of it away, as the "
        "paper does.",
        source="NeoMME in transformers; the paper trains from scratch",
    )


class Exclusive(Variant):
    """Attention `o - tanh(alpha) (o u) u` per query head, u the token's own value at length 1, alpha 0 at the start."""

    config_class = ExclusiveConfig
    config: ExclusiveConfig
    splits_by_head = True

    def __init__(self, config: ExclusiveConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        heads = site.require("query_heads", by="exclusive self-attention")
        self.alpha = nn.Parameter(torch.zeros(heads)) if config.learned else None

    @classmethod
    def fit(
        cls, config: ExclusiveConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[ExclusiveConfig, Sequence[AttentionSite]]:
        because = "a token has no value of its own in another sequence"
        return config, require_self(sites, by="Exclusive self-attention", because=because)

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"learned": True}

    @property
    def needs_context(self) -> bool:
        return True

    def fast_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        output, weights = inner(call)
        dtype = torch.promote_types(output.dtype, torch.float32)
        value = nn.functional.normalize(self._own_values(call).to(dtype), dim=-1)
        along = (output.to(dtype) * value).sum(-1, keepdim=True)
        if self.alpha is not None:
            along = along * self.alpha.to(dtype).tanh()[:, None]
        return output - (along * value).to(output.dtype), weights

    def _own_values(self, call: AttentionCall) -> torch.Tensor:
        """`(B, Tq, H, D)` of each query's own token."""
        context = call.context
        if context.of_some_keys or call.mask.index is not None:
            raise NotImplementedError(
                f"Exclusive self-attention needs each token's own value, and {self.site.name} is given only some of "
                "the keys: its kv cache has dropped some, or another variant hands on a choice. Patch one of the two "
                "alone."
            )
        value, heads = call.value, call.query.shape[1]
        if context.query.shape[2] != value.shape[2]:
            place = ranks.own(call.mask)[:, None, :, None]
            value = value.gather(2, place.expand(len(value), value.shape[1], -1, value.shape[3]))
        elif context.rows is not None:
            value = value.index_select(2, context.rows)
        return value.repeat_interleave(heads // value.shape[1], dim=1).transpose(1, 2)

    def fold(self, plain: nn.Module) -> None:
        if self.alpha is None or self.alpha.any():
            raise NotImplementedError("what it takes away depends on the token's own value, which no weights know")


register_variant(
    VariantInfo(
        name="exclusive",
        variant=Exclusive,
        title="Exclusive Self Attention",
        arxiv_id="2603.09078",
        year=2026,
        summary="What heads give along their token's own value is taken away, by a learned share.",
        extra_parameters="one value per query head and layer",
        needs_training=True,
        capabilities=ALL_CAPABILITIES - {"cross"},
        presets={"paper": {"learned": False}},
        examples=({}, {"learned": False}),
    )
)
