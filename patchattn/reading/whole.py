"""Choices among all keys of a text, by their columns: no key may have left the kv cache."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..core import ranks
from ..core.call import AttentionCall
from ..core.chain import window_of
from ..core.mask import Mask
from ..core.selection import require_causal
from ..core.sites import AttentionSite
from .selection import SelectionVariant


class WholeSelection(SelectionVariant):
    """A variant that chooses among all keys of a text, each of which has a lasting column.

    Layers with a sliding window are left out when a model is patched, and kv caches that forget keys are refused.
    """

    @classmethod
    def fit(cls, config: Any, model: nn.Module, sites: Sequence[AttentionSite]) -> tuple[Any, Sequence[AttentionSite]]:
        return config, whole_sites(model, sites, by=cls.__name__)

    def check(self, call: AttentionCall) -> None:
        """To be asked in every call: NotImplementedError if the keys have no lasting place."""
        refuse_some_keys(call, by=self.owner)

    @property
    def owner(self) -> str:
        """Name for messages, and of what is remembered."""
        return type(self).__name__


def whole_sites(model: nn.Module, sites: Sequence[AttentionSite], *, by: str) -> list[AttentionSite]:
    """The attention modules whose queries may see all keys of a text: causal, and without a sliding window.

    Raises:
        NotImplementedError: there is none; the message names who asks.
    """
    causal = require_causal(model, sites, by=by, because="it says what tokens read of those before them")
    whole = [site for site in causal if window_of(model.get_submodule(site.name)) is None]
    if not whole:
        raise NotImplementedError(
            f"{by} chooses among all keys of a text and leaves out layers with a sliding window, whose kv cache lets "
            "go of keys: no other one is among the chosen attention modules."
        )
    return whole


def refuse_some_keys(call: AttentionCall, *, by: str) -> None:
    """NotImplementedError if the keys of a call have no lasting place; the message names who asks."""
    if call.mask.index is not None or call.mask.dropped or call.mask.extra:
        raise NotImplementedError(
            f"{by} chooses among all keys of a text, and in {call.site.name} the kv cache lets go of some, or keys "
            "come in front of the others: use it without the variant that drops or adds keys."
        )


def keys_so_far(mask: Mask) -> torch.Tensor:
    """`(B or 1, 1, Tk)` bool: which keys are text, up to that of the last query; a static cache has slots behind it.

    Raises:
        NotImplementedError: nothing says which key is a query's own.
    """
    return mask.real_keys() & (torch.arange(mask.keys, device=mask.device) <= ranks.own(mask)[:, -1:, None])
