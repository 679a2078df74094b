"""Gates: what heads give is multiplied, channel by channel or head by head, before the output projection."""

from typing import final

import torch

from ..core.call import AttentionCall
from ..core.variant import Attend, AttentionOutput, Variant


class GateVariant(Variant):
    """A variant that multiplies the output of attention. It leaves queries, keys, weights and caches alone."""

    def gate(self, call: AttentionCall, output: torch.Tensor) -> torch.Tensor:
        """`(B, Tq, H, 1 or D)` what the output `(B, Tq, H, D)` is multiplied by."""
        raise NotImplementedError(f"{type(self).__name__} must define gate(call, output).")

    @final
    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        output, weights = inner(call)
        gate = self.gate(call, output)
        if gate.shape[-1] not in (1, output.shape[-1]):
            raise NotImplementedError(
                f"{type(self).__name__} has {gate.shape[-1]} gates for every head of {self.site.name}, whose values "
                f"are {output.shape[-1]} wide: gate whole heads."
            )
        return output * gate.to(output.dtype), weights
