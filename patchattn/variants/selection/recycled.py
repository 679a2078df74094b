"""Recycled attention: tokens read what an earlier one attended to most, until all is read. arXiv 2411.05787."""

from dataclasses import dataclass
from typing import Any

import torch

from patchattn_kernels.rows import full_precision, log_sum_exp, row_logits, weights_of

from ...core.call import AttentionCall
from ...core.places import Places
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import VariantConfig, VariantInfo
from ...reading.selection import CAPABILITIES
from ...reading.whole import WholeSelection

_CHOICE, _WHEN = "choice", "when"


@dataclass(frozen=True, kw_only=True)
class RecycledConfig(VariantConfig):
    """Settings of Recycled Attention."""

    budget: int | None = option(
        4096,
        help="Keys that are recycled in each kv head; those of later tokens are read besides. None: all.",
        source="paper",
        unit="keys",
        minimum=1,
    )
    every: int = option(
        50,
        help="Decoding tokens from one that reads all keys to the next. 1: each does.",
        source="paper",
        unit="tokens",
        minimum=1,
    )

    @property
    def looks_ahead(self) -> bool:
        """Which keys a token reads depends on which ones came with it, and which were read in full before it."""
        return self.budget is not None and self.every > 1


class Recycled(WholeSelection):
    """Attention of decoding tokens to the keys that the last token that read all attended to most, and those since."""

    config_class = RecycledConfig
    config: RecycledConfig

    @property
    def keeps_state(self) -> bool:
        return True

    @property
    def is_identity(self) -> bool:
        return self.config.budget is None or self.config.every == 1

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"budget": None}

    def select(self, call: AttentionCall) -> Places | None:
        state = call.context.sequence_state(self.owner)
        self.check(call)
        budget, columns = self.config.budget, call.mask.columns
        if budget is None or state is None:
            return None
        if not state.grows:
            raise NotImplementedError(
                f"{self.owner} reads keys again by their places, and in the kv cache of {self.site.name}, static or "
                "sliding, these do not last: use a dynamic cache."
            )
        if not call.decodes:
            state.tensors.pop(_CHOICE, None)  # what it was made by may have been taken back before this call
        if columns <= budget:
            return None
        if _CHOICE in state.tensors:
            # the number of keys is remembered as a size, which the host knows without asking the device
            known, when = state.tensors[_CHOICE], state.tensors[_WHEN].shape[1]
            if when < columns < when + self.config.every:
                since = torch.arange(when, columns, device=known.device).expand(*known.shape[:2], -1)
                return Places(torch.cat([known, since], dim=-1))
        choice = most_attended(call, budget)
        state.write(_CHOICE, choice)
        state.write(_WHEN, choice.new_empty(len(choice), columns, 0))
        return None


def most_attended(call: AttentionCall, count: int) -> torch.Tensor:
    """`(B, Hkv, count)` int, ascending: the keys that the last query attends to most, of equal ones the first.

    Query heads of a kv head have one choice, by the mean of their weights.
    """
    last = call.row(call.query.shape[2] - 1)
    with torch.no_grad():
        rule = last.rule()
        logits = row_logits(full_precision(last.query), full_precision(last.key), rule, slice(None))
        weights = weights_of(logits, log_sum_exp(logits, rule))[:, :, 0]
        mean = weights.unflatten(1, (call.key.shape[1], -1)).mean(dim=2)
    return mean.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(dim=-1).values


register_variant(
    VariantInfo(
        name="recycled",
        variant=Recycled,
        title="Recycled Attention: Efficient inference for long-context language models",
        arxiv_id="2411.05787",
        year=2024,
        summary="Decoding tokens read the keys that an earlier one attended to most, until one reads all again.",
        extra_parameters="none",
        needs_training=False,
        capabilities=CAPABILITIES - {"static_cache"},
        examples=({"budget": 3, "every": 4},),
    )
)
