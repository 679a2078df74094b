"""What looks at the calls of an attention module: no variant, and in no chain's order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from .call import AttentionCall

See = Callable[[AttentionCall, torch.Tensor, torch.Tensor | None], torch.Tensor]
Place = Literal["model", "base"]


@dataclass(frozen=True, eq=False)
class Probe:
    """One look at the calls of a chain of variants.

    Attributes:
        see: gets the call, its output `(B, Tq, H, D)` and its weights `(B, H, Tq, Tk)`, or `None`; what it returns goes
            on as the output.
        at: outside of all variants, or inside of them all.
        reaches_base: variants may not compute by an operation of their own in place of the base implementation.
        weights: computes weights from a call. A variant that computes attention weights itself is then looked at in
            place of the base, and given these where the base gives none.
    """

    see: See
    at: Place
    reaches_base: bool = False
    weights: Callable[[AttentionCall], torch.Tensor] | None = None

    def depth(self, innermost: Sequence[bool]) -> int:
        """How many variants it looks behind, of those that say whether they compute weights themselves."""
        if self.at == "model":
            return 0
        own = self.weights is not None and any(innermost)
        return list(innermost).index(True) if own else len(innermost)
