"""Whether prompts begin with the prefix whose keys were clustered: their tokens are compared with its own."""

import torch
from torch import nn

from ....core.call import AttentionCall
from ....core.hooks import Hook
from ....core.token_ids import TokenIdVariant, token_ids
from ....reading.selection import plain_own
from ....reading.whole import WholeSelection
from .settings import SqueezedConfig


class ComparedPrompts(TokenIdVariant, WholeSelection):
    """A variant that compares the tokens of prompts with a prefix.

    Attributes:
        prefix: `(length,)` int64 ids of its tokens, where the settings say that it compares.
    """

    config: SqueezedConfig
    name = "squeezed"
    prefix: torch.Tensor

    def hooks(self, model: nn.Module) -> list[Hook]:
        return super().hooks(model) if self.config.compares else super(TokenIdVariant, self).hooks(model)

    def compare(self, call: AttentionCall) -> None:
        """To be asked in every call that a prefix may begin or go on in: ValueError unless its tokens are those of the
        prefix, as far as it goes."""
        own = plain_own(call.mask)
        if not self.config.compares or (own is not None and own >= self.config.length):
            return
        if torch.compiler.is_compiling():
            raise NotImplementedError("squeezed compares prompts with its prefix, for which compiled code cannot wait.")
        ids, row = token_ids(call), call.query_positions()
        place = row.clamp(0, self.config.length - 1)
        wrong = (ids != self.prefix[place]) & (row >= 0) & (row < self.config.length) & call.mask.real()
        if bool(wrong.any()):
            text, number = (int(index) for index in wrong.nonzero()[0])
            where = int(row.expand(len(wrong), -1)[text, number])
            raise ValueError(
                f"The prompt does not begin with the prefix of {self.config.length} tokens that squeezed was "
                f"calibrated for: token {where} of sequence {text} is {int(ids[text, number])}, expected "
                f"{int(self.prefix[where])}. Begin every prompt with the very tokens of the prefix, whose end a "
                "tokenizer may join with what follows, or calibrate for another one."
            )
