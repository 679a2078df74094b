"""Choices of decoding tokens that serve later ones, until one is made anew: every so many tokens, or on drift."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from patchattn_kernels.rows import full_precision

from ..cache.state import SequenceState
from ..core.call import AttentionCall
from ..core.settings import option

_CHOICE, _WHEN, _QUERY = "choice", "when", "query"


class Choice(NamedTuple):
    """What an earlier token chose.

    Attributes:
        chosen: `(B, ...)`, as it was told.
        columns: how many keys there were, its own among them.
    """

    chosen: torch.Tensor
    columns: int


def refresh_option(default: int, *, source: str) -> Any:
    """The setting that says how long a choice lasts."""
    return option(
        default,
        help="Tokens that a choice lasts while decoding: it is made anew where the number of keys is a multiple.",
        source=source,
        unit="tokens",
        minimum=1,
    )


def last_choice(state: SequenceState, columns: int) -> Choice | None:
    """The last choice on a kv cache that grows, if it was made before these columns were all there."""
    if _CHOICE not in state.tensors:
        return None
    # the number of keys is remembered as a size, which the host knows without asking the device
    when = state.tensors[_WHEN].shape[1]
    return Choice(state.tensors[_CHOICE], when) if when < columns else None


def remember_choice(state: SequenceState, chosen: torch.Tensor, columns: int) -> None:
    """Have `last_choice` give this one to later calls."""
    state.write(_CHOICE, chosen)
    state.write(_WHEN, chosen.new_empty(len(chosen), columns, 0))


def forget_choice(state: SequenceState | None) -> None:
    """No earlier choice counts: what it was made by may have been taken back."""
    if state is not None:
        state.tensors.pop(_CHOICE, None)


def is_due(columns: int, made: int, every: int) -> bool:
    """Whether a multiple of `every` has been reached since a choice that was made when `made` keys were there."""
    return made // every != columns // every


def drifted(call: AttentionCall, state: SequenceState, below: float) -> torch.Tensor:
    """`(B,)` bool: whether a sequence's query is less like the one that was noted than so, by their mean cosine over
    heads; that one is noted from then on."""
    query = call.query[:, :, -1].detach()
    known = state.tensors.get(_QUERY)
    if known is None:
        fresh = torch.ones(len(query), dtype=torch.bool, device=query.device)
    else:
        fresh = F.cosine_similarity(full_precision(query), full_precision(known), dim=-1).mean(dim=-1) < below
        query = torch.where(fresh[:, None, None], query, known)
    state.write(_QUERY, query.clone())
    return fresh
