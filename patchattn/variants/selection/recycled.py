"""Recycled attention: tokens read what an earlier one attended to most, until all is read. arXiv 2411.05787."""

from dataclasses import dataclass
from typing import Any

import torch

from ...cache.state import SequenceState
from ...core.call import AttentionCall
from ...core.places import Places
from ...core.registry import register_variant
from ...core.settings import option
from ...core.variant import VariantConfig, VariantInfo
from ...reading.groups import reduced
from ...reading.refresh import Choice, drifted, forget_choice, last_choice, remember_choice
from ...reading.scores import weights_with
from ...reading.selection import CAPABILITIES
from ...reading.whole import WholeSelection


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
        help="Decoding tokens from one that reads all keys to the next, or, with `similarity`, from one whose query is "
        "compared to the next. 1: each does.",
        source="paper; 5 where queries are compared (preset=dynamic)",
        unit="tokens",
        minimum=1,
    )
    similarity: float | None = option(
        None,
        help="Cosine of a token's queries with those of the last one that read all keys, the mean over heads, below "
        "which it reads all keys too. None: every so many tokens, whatever the queries are.",
        source="paper: 0.8 where queries are compared (preset=dynamic)",
        minimum=-1.0,
        maximum=1.0,
    )

    @property
    def looks_ahead(self) -> bool:
        """Which keys a token reads depends on which ones came with it, and which were read in full before it."""
        return not self.reads_all

    @property
    def reads_all(self) -> bool:
        """Whether every token reads all keys."""
        return self.budget is None or (self.every == 1 and self.similarity is None)


class Recycled(WholeSelection):
    """Attention of decoding tokens to the keys that the last token that read all attended to most, and those since."""

    config_class = RecycledConfig
    config: RecycledConfig
    needs_groups = True

    @property
    def keeps_state(self) -> bool:
        return True

    @property
    def is_identity(self) -> bool:
        return self.config.reads_all

    @property
    def splits_by_head(self) -> bool:
        """Queries of all heads are compared at once."""
        return self.config.similarity is None

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"budget": None}

    def select(self, call: AttentionCall) -> Places | torch.Tensor | None:
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
            forget_choice(state)
        if columns <= budget:
            return None
        last = last_choice(state, columns)
        if last is not None and columns < last.columns + self.config.every:
            return self._with_those_since(last, columns)
        return self._refreshed(call, state, last, budget)

    def _refreshed(
        self, call: AttentionCall, state: SequenceState, last: Choice | None, budget: int
    ) -> Places | torch.Tensor | None:
        """What is read where a choice is due; in sequences whose query is not compared, or is unlike, all keys."""
        columns = call.mask.columns
        if self.config.similarity is None or last is None:
            newest = last_of_texts(call)
            if newest is None:  # the next token reads all keys, and chooses
                return None
            if self.config.similarity is not None:
                drifted(newest, state, below=float("inf"))  # notes every query
            remember_choice(state, most_attended(newest, budget), columns)
            return None
        if torch.compiler.is_compiling():
            raise NotImplementedError(
                f"{self.owner} compares queries (similarity={self.config.similarity}), for which compiled code cannot "
                "wait: use similarity=None, or do not compile."
            )
        fresh, known = drifted(call, state, self.config.similarity), self._with_those_since(last, columns)
        if bool(fresh.all()):
            remember_choice(state, most_attended(call, budget), columns)
            return None
        if not bool(fresh.any()):
            remember_choice(state, known.index, columns)
            return known
        # empty slots come first: some sequences have a longer list now
        old, new = known.index, most_attended(call, budget)
        width = max(old.shape[-1], new.shape[-1])
        old, new = (torch.nn.functional.pad(each, (width - each.shape[-1], 0), value=-1) for each in (old, new))
        remember_choice(state, torch.where(fresh[:, None, None], new, old), columns)
        return known.kept(call.key.shape[2]) | fresh[:, None, None]

    def _with_those_since(self, last: Choice, columns: int) -> Places:
        since = torch.arange(last.columns, columns, device=last.chosen.device)
        index = torch.cat([last.chosen, since.expand(*last.chosen.shape[:2], -1)], dim=-1)
        return Places(index, has_empty=self.config.similarity is not None)


def last_of_texts(call: AttentionCall) -> AttentionCall | None:
    """The call of the last query of every sequence that is text; `None` where one has padding alone in this call."""
    count, mask = call.query.shape[2], call.mask
    if count == 1 or (mask.real_columns is None and mask.pairs is None):
        return call.row(count - 1)
    number = torch.arange(count, device=mask.device)
    rows = torch.where(mask.real(), number, -1).amax(dim=-1).expand(len(call.query))
    if bool((rows < 0).any()):
        return None
    kwargs = dict(call.kwargs)
    if kwargs.get("position_bias") is not None:
        bias = kwargs["position_bias"].expand(len(rows), -1, count, -1)
        kwargs["position_bias"] = bias[torch.arange(len(rows)), :, rows][:, :, None]
    query = call.query[torch.arange(len(rows)), :, rows][:, :, None]
    return call.replace(query=query, mask=mask.of_rows(rows[:, None]), kwargs=kwargs)


def most_attended(call: AttentionCall, count: int) -> torch.Tensor:
    """`(B, Hkv, count)` int, ascending: the keys that the only query attends to most, of equal ones the first.

    Query heads of a kv head have one choice, by the mean of their weights.
    """
    with torch.no_grad():
        mean = reduced(weights_with(call, call.key), call.key.shape[1], "mean")[:, :, 0]
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
        presets={"dynamic": {"every": 5, "similarity": 0.8}},
        examples=({"budget": 3, "every": 4},),  # to compare queries waits for the device
    )
)
