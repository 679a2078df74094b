"""Variants that choose which keys a kv cache keeps."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from patchattn_kernels import SinkAndRecent

from ..cache.kept import is_worth_moving
from ..cache.state import SequenceState
from ..core.call import AttentionCall
from ..core.mask import Keep
from ..core.selection import causal_sites
from ..core.settings import option
from ..core.sites import AttentionSite
from ..core.surroundings import Surroundings
from ..core.variant import ALL_CAPABILITIES, Attend, AttentionOutput, Variant
from .budgets import Budget, BudgetConfig, best
from .groups import attended_by_groups
from .selection import skipping, skips

# Encoders, other sequences and position biases of the stored length have no keys that could be dropped; static caches
# and compiled calls cannot let go of any.
CAPABILITIES = ALL_CAPABILITIES - {"bidirectional", "cross", "position_bias", "static_cache", "compile"}

Event = Literal["prompt", "chunk", "call"]
EVENTS = (
    "When keys are dropped: 'prompt', at the first single token after calls of several, so that chunks of a prompt do "
    "not matter; 'chunk', at the end of every call of several tokens; 'call', at the end of every call."
)
_DECIDED = "kept"  # keys that the next single token will see, of those stored
_MAY_BE_GUESSES = (
    "chooses keys at the end of a prompt, and what it was just given may hold guesses that are taken back: no assisted "
    "decoding, and no crop before the next single token, under this variant."
)
_DROPPED = (
    "has dropped keys by scores of the last tokens, and takes none of those back: no cropped cache, and so no assisted "
    "decoding, under this variant."
)


class EvictionVariant(Variant):
    """A variant that drops keys of the kv cache; without one it drops nothing.

    A subclass gives `rule`, what queries see at most, and `forget`, which keys no later call will see.
    """

    kind = "cache"
    keeps_state = True
    needs_groups = True
    name: ClassVar[str]  # as it is registered

    def __init__(self, config: Any, site: AttentionSite) -> None:
        super().__init__(config, site)
        given = [
            f"{item.name}={value}"
            for item in fields(config)
            if (value := getattr(config, item.name)) != item.default and item.name not in config.by_module
        ]
        self.owner = f"{self.name}({', '.join(given)})"  # whoever has other settings is another one

    @classmethod
    def fit(cls, config: Any, model: nn.Module, sites: Sequence[AttentionSite]) -> tuple[Any, Sequence[AttentionSite]]:
        """Leave out attention without a kv cache of its own: of encoders, and to other sequences."""
        own = causal_sites(model, sites)
        if not own:
            raise NotImplementedError(
                f"{cls.name!r} drops keys of a kv cache, and no attention module that was chosen in "
                f"{type(model).__name__} is causal self-attention, which has one."
            )
        return config, own

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        has_cache = call.context.claim(self.owner)
        output = self.attended(call, inner)
        if has_cache:
            self.forget(call)
        return output

    def attended(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        """Attention under the rule: where that is all that hides keys, what it hides is not read."""
        keeps = call.mask.keeps
        if len(keeps) == 1 and isinstance(keeps[0], SinkAndRecent):
            whole = call.replace(mask=replace(call.mask, keeps=()))
            if skips(whole, keeps[0]):
                return skipping(whole, keeps[0]), None
        output = attended_by_groups(call)
        return inner(call) if output is None else (output, None)

    def forget(self, call: AttentionCall) -> None:
        """After attention: tell the kv cache by `call.context.keep` what is left."""
        raise NotImplementedError(f"{type(self).__name__} must define forget(call).")


def keep_first_and_last(
    call: AttentionCall,
    context: Surroundings,
    owner: str,
    *,
    sinks: int,
    recent: int,
    slack: int,
    since: int | None = None,
) -> None:
    """Tell the kv cache to keep the first real keys and the last ones, also were `slack` tokens taken back.

    Nobody but a rule that hides the others may see them: the cache is told only where enough of them leave it at once.

    Args:
        call: the call.
        context: around it.
        owner: who decides.
        sinks: how many first ones.
        recent: how many last ones.
        slack: so many tokens can be taken back.
        since: so many tokens ago it was right already; as many as can be taken back, by default.
    """
    since = slack if since is None else since
    if since >= slack and not is_worth_moving(call.mask.keys, sinks + recent + since):
        return
    order = call.mask.key_order()
    newest = order[..., : call.mask.keys - since].amax(-1, keepdim=True)
    kept = call.mask.real_keys() & ((order <= sinks) | (newest - order < recent))
    context.keep(owner, kept.expand(len(call.key), -1, -1), bound=sinks + recent, slack=slack, since=since)


@dataclass(frozen=True, kw_only=True)
class ScoredConfig(BudgetConfig):
    """Settings of variants that keep the keys with the highest scores."""

    event: Event = option(
        "prompt",
        help=EVENTS,
        source="the papers compress a prompt once",
        choices=("prompt", "chunk", "call"),
    )


class ScoredEviction(EvictionVariant):
    """Keeps the keys with the highest scores of each kv head, of equal ones those that came first.

    A subclass gives `scores` and `default_budget`, and may reserve `last` keys.
    """

    config: ScoredConfig
    default_budget: ClassVar[int]

    def __init__(self, config: ScoredConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        self.budget = Budget(config, self.default_budget, site)

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"budget": 1 << 30, "compression_ratio": None}

    def counts(self, call: AttentionCall) -> torch.Tensor:
        """`(B or 1, 1 or Hkv, 1)` how many keys are kept."""
        return self.budget.of(call)

    def last(self, counts: torch.Tensor) -> int | torch.Tensor:
        """So many of the keys that are kept are the last ones, whatever their scores."""
        return 0

    def scores(self, call: AttentionCall, state: SequenceState) -> torch.Tensor:
        """`(B, 1 or Hkv, Tk)` of the keys of a call, in float32 at least; a dimension of 1: one set for all heads.

        Args:
            call: the call whose end decides.
            state: what may be remembered of the sequence.
        """
        raise NotImplementedError(f"{type(self).__name__} must define scores(call, state).")

    def observe(self, call: AttentionCall, state: SequenceState) -> None:
        """Remember what scores will need of a call, in every call."""

    def chosen(self, call: AttentionCall, state: SequenceState) -> torch.Tensor:
        """`(B, 1 or Hkv, Tk)` bool: the keys that are kept."""
        counts = self.counts(call)
        return best(self.scores(call, state), call.mask.real_keys(), counts, self.last(counts))

    def bound(self, columns: int) -> int | None:
        """Most keys that are kept of a row and head that has seen so many, padding included; `None`: ask the device."""
        return self.budget.most(columns)

    def window(self) -> int | None:
        """Queries at the end of a prompt that scores are made of; `None`: all, since the first."""
        return None

    def state(self, call: AttentionCall) -> SequenceState | None:
        """What is remembered; where the end of a prompt is enough, one call of several tokens can be the first."""
        window = self.window()
        return call.context.sequence_state(self.owner, late=None if window is None else max(2, window))

    def rule(self, call: AttentionCall) -> Keep | None:
        if self.config.event != "prompt" or call.query.shape[2] > 1:
            return None
        state = self.state(call)
        kept = None if state is None else state.tensors.get(_DECIDED)
        return None if kept is None else F.pad(kept, (0, 1), value=True)

    def forget(self, call: AttentionCall) -> None:
        state, event, is_single = self.state(call), self.config.event, call.query.shape[2] == 1
        if state is None:
            return
        self.observe(call, state)
        columns = call.mask.columns
        kept = state.tensors.pop(_DECIDED, None)
        if is_single and kept is not None:
            self.budget.refuse(call, since=1)
            kept = F.pad(kept, (0, 1), value=True)
            call.context.keep(self.owner, kept, bound=self.bound(columns - 1), slack=0, since=1)
            state.settled = None
        if (is_single and event != "call") or call.mask.keys <= self.budget.least(columns):
            return
        if self.window() is not None:
            refuse_padding_behind(call, self.owner)
        kept = self.chosen(call, state)
        if event == "prompt":
            state.write(_DECIDED, kept)
            state.settled = _MAY_BE_GUESSES
        else:
            if not is_single or call.context.columns() is None:  # of a longer sequence it leaves no fewer
                self.budget.refuse(call)
            call.context.keep(self.owner, kept, bound=self.bound(columns), slack=0)
            state.settled = _DROPPED


def refuse_padding_behind(call: AttentionCall, owner: str) -> None:
    """NotImplementedError if the last query of several, which chooses keys, is padding behind a text."""
    mask = call.mask
    if mask.queries == 1 or (mask.real_columns is None and mask.pairs is None):
        return
    has_text = mask.real_keys().flatten(1).any(-1)
    if bool((has_text & ~mask.real()[:, -1]).any()):
        raise NotImplementedError(
            f"{owner} in {call.site.name} keeps the keys that the last queries of a prompt attend to, and padding "
            "stands behind some prompts: pad them on the left."
        )
