"""What layers hand on: the residual stream behind each, to look at and to change."""

from typing import Any

import torch
from torch import nn

from .call import AttentionCall
from .hooks import Hook
from .run import current_run, forget, run_of
from .variant import Attend, AttentionOutput, Variant


def enclosing_block(model: nn.Module, site_name: str) -> str:
    """Name of the layer that an attention module is in: of a list of layers of one class, as T5's blocks are, and
    not the parts that its blocks are lists of; else the innermost numbered module.

    Raises:
        NotImplementedError: it is in no numbered module.
    """
    parts = site_name.split(".")
    numbered = [".".join(parts[: i + 1]) for i, part in enumerate(parts[:-1]) if part.isdecimal()]
    if not numbered:
        raise NotImplementedError(f"{site_name} is in no numbered layer, whose output is to be changed.")
    alike = [
        name
        for name in numbered
        if len({type(child) for child in model.get_submodule(name.rpartition(".")[0]).children()}) == 1
    ]
    return (alike or numbered)[-1]


def hidden_of(output: Any) -> torch.Tensor:
    """`(B, T, E)` what a layer hands on: its output, or the first of several.

    Raises:
        NotImplementedError: it is no such tensor.
    """
    hidden = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(hidden, torch.Tensor) or hidden.dim() != 3:
        found = tuple(hidden.shape) if isinstance(hidden, torch.Tensor) else type(hidden).__name__
        raise NotImplementedError(f"A layer's output is expected to be (B, T, E), or to begin with it, got {found}.")
    return hidden


def with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    """A layer's output with another hidden state."""
    if isinstance(output, torch.Tensor):
        return hidden
    return type(output)([hidden, *output[1:]])


class LayerOutputVariant(Variant):
    """A variant that changes what the layer of its attention module hands on, the residual stream behind it.

    A subclass gives `changed`, and `chosen_rows` if it changes some tokens only.
    """

    def hooks(self, model: nn.Module) -> list[Hook]:
        block = model.get_submodule(enclosing_block(model, self.site.name))
        return [
            Hook(block, "before", self.before_layer),
            Hook(block, "after", self.after_layer),
            Hook(block, "finally", self.leave_layer),
        ]

    def changed(self, hidden: torch.Tensor) -> torch.Tensor:
        """New hidden states `(B, T, E)`, of all tokens."""
        raise NotImplementedError(f"{type(self).__name__} must define changed(hidden).")

    def chosen_rows(self, call: AttentionCall) -> torch.Tensor | None:
        """`(B or 1, Tq)` bool: which tokens of a call are changed; `None`: all."""
        return None

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        rows = self.chosen_rows(call)
        notes = run_of({}).notes
        if rows is not None and self._note in notes:
            notes[self._note] = rows
        return inner(call)

    def before_layer(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Attention that runs without its layer's hooks, as in activation checkpointing, finds no note to fill."""
        current_run().notes[self._note] = None

    def leave_layer(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Also where the layer failed, or activation checkpointing stopped it as soon as backward had what it needs."""
        forget(self._note)

    def after_layer(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        hidden = hidden_of(output)
        rows = current_run().notes.get(self._note)
        new = self.changed(hidden)
        if rows is not None:
            if rows.shape[1] != hidden.shape[1] or len(rows) not in (1, len(hidden)):
                raise NotImplementedError(
                    f"{type(module).__name__} hands on {hidden.shape[1]} tokens in a batch of {len(hidden)}, but its "
                    f"attention ({self.site.name}) last saw {rows.shape[1]}: which is which is not known. Leave it out "
                    "with modules=..."
                )
            new = torch.where(rows[..., None].to(hidden.device), new, hidden)
        return with_hidden(output, new)

    @property
    def _note(self) -> str:
        return f"rows of {self.site.name} for {type(self).__name__}"
