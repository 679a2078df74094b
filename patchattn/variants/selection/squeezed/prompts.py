"""Whether prompts begin with the prefix whose keys were clustered: their tokens are compared with its own."""

from typing import Any

import torch
from torch import nn

from ....core.call import AttentionCall
from ....core.hooks import Hook, note_token_ids
from ....core.run import current_run, end_run
from ....core.selection import base_model
from ....core.token_ids import text_model, token_ids, with_token_ids
from ....reading.selection import plain_own
from ....reading.whole import WholeSelection
from .settings import SqueezedConfig


class ComparedPrompts(WholeSelection):
    """A variant that is told which tokens a call is of, by hooks on the text model, and compares them with a prefix.

    Attributes:
        prefix: `(length,)` int64 ids of its tokens, where the settings say that it compares.
    """

    config: SqueezedConfig
    prefix: torch.Tensor

    def hooks(self, model: nn.Module) -> list[Hook]:
        if not self.config.compares:
            return super().hooks(model)
        base: Any = base_model(model)
        text = text_model(base, self.site.name)
        return [
            *super().hooks(model),
            Hook(base, "before", self.before_model),
            Hook(text.get_input_embeddings(), "before", self.before_embedding),  # type: ignore[operator]
            Hook(text, "before", self.before_text_model),
            Hook(text, "finally", self.after_text_model),
            Hook(base, "finally", self.after_model),
        ]

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current_run().token_ids = None  # of what was embedded outside of a forward

    def before_embedding(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note_token_ids(args, kwargs)

    def before_text_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return with_token_ids("squeezed", module, self.before_embedding, args, kwargs)

    def after_text_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        current_run().token_ids = None

    def after_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        end_run()

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
