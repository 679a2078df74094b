"""Choices among all keys of a text, by their columns: no key may have left the kv cache."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..core import ranks
from ..core.call import AttentionCall
from ..core.chain import window_of
from ..core.mask import Mask
from ..core.sites import AttentionSite
from .selection import SelectionVariant


class WholeSelection(SelectionVariant):
    """A variant that chooses among all keys of a text, each of which has a lasting column.

    Layers with a sliding window are left out when a model is patched, and kv caches that forget keys are refused.
    """

    @classmethod
    def fit(cls, config: Any, model: nn.Module, sites: Sequence[AttentionSite]) -> tuple[Any, Sequence[AttentionSite]]:
        config, causal = super().fit(config, model, sites)
        whole = [site for site in causal if window_of(model.get_submodule(site.name)) is None]
        if not whole:
            raise NotImplementedError(
                f"{cls.__name__} chooses among all keys of a text and leaves out layers with a sliding window, whose "
                "kv cache lets go of keys: no other one is among the chosen attention modules."
            )
        return config, whole

    def check(self, call: AttentionCall) -> None:
        """To be asked in every call: NotImplementedError if the keys have no lasting place."""
        if call.mask.index is not None or call.mask.dropped or call.mask.extra:
            raise NotImplementedError(
                f"{self.owner} chooses among all keys of a text, and in {self.site.name} the kv cache lets go of some, "
                "or keys come in front of the others: use it without the variant that drops or adds keys."
            )

    @property
    def owner(self) -> str:
        """Name for messages, and of what is remembered."""
        return type(self).__name__


def keys_so_far(mask: Mask) -> torch.Tensor:
    """`(B or 1, 1, Tk)` bool: which keys are text, up to that of the last query; a static cache has slots behind it.

    Raises:
        NotImplementedError: nothing says which key is a query's own.
    """
    return mask.real_keys() & (torch.arange(mask.keys, device=mask.device) <= ranks.own(mask)[:, -1:, None])
