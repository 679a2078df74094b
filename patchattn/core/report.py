"""What a variant reports while it runs."""

from dataclasses import dataclass

import torch
from torch import nn

from .call import AttentionCall
from .sites import AttentionSite
from .surroundings import LayerContext


@dataclass(eq=False)
class Observation:
    """What a variant reports while it runs; see `patchattn.observe`.

    Attributes:
        site: the attention module, as plain data.
        values: tensors by name, such as `gate` `(B, Tq, H)` of MoH. Padded rows are included.
        source: the call they belong to; or, for what is said of keys and values on their way into the cache, the
            context of the module.
    """

    site: AttentionSite
    values: dict[str, torch.Tensor]
    source: AttentionCall | LayerContext

    @property
    def module(self) -> nn.Module:
        """The attention module."""
        return self.source.module

    def real_tokens(self) -> torch.Tensor:
        """`(B or 1, T or 1)` bool: which rows of the values are text rather than padding."""
        if isinstance(self.source, LayerContext):  # said of keys and values, which cross attention makes of the memory
            return self.source.real_tokens(memory=self.site.is_cross)
        return self.source.mask.real()
