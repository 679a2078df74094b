"""Variants that change a model's weights and shapes, keeping what they take out so that it can be put back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from ..core.call import AttentionCall
from ..core.linear import is_adapted, is_dispatched
from ..core.renaming import Renaming
from ..core.sites import AttentionSite
from ..core.variant import Attend, AttentionOutput, Variant


@dataclass(eq=False)
class Change:
    """One thing of a model that surgery exchanges.

    Attributes:
        module: path of the module that it belongs to.
        name: of a parameter, a child or an attribute of that module.
        value: what takes its place; once exchanged, what was there.
    """

    module: str
    name: str
    value: Any

    def exchange(self, model: nn.Module) -> None:
        """Swap the value with the one in the model; twice changes nothing."""
        owner = model.get_submodule(self.module)
        place = next((p for p in (owner._parameters, owner._modules) if self.name in p), vars(owner))
        place[self.name], self.value = self.value, place[self.name]

    def check_undo(self, model: nn.Module, variant: str) -> None:
        """ValueError if what was there before the variant came cannot be put back."""
        if _is_meta(self.value):
            raise ValueError(
                f"{self.module}.{self.name} was loaded without what {variant} took out: it was not saved. Load the "
                "base model instead of unpatching this one."
            )
        owner = model.get_submodule(self.module)
        if is_dispatched(owner):
            raise ValueError(
                f"{self.module} is offloaded or dispatched by accelerate, which holds its weights: call "
                "accelerate.hooks.remove_hook_from_submodules(model) first."
            )
        if is_adapted(owner):
            raise ValueError(f"{self.module} carries a PEFT adapter: unload() or merge_and_unload() it first.")


class SurgeryVariant(Variant):
    """A variant that exchanges parts of the model it is attached to.

    A subclass gives `plan`. What was taken out is kept beside the model, on its device and in its dtype, until the
    model is saved; `unpatch_model` puts the same tensors back. It comes before every other variant of its attention
    module: those see the new shapes.
    """

    kind = "surgery"
    attends = False

    def __init__(self, config: Any, site: Any) -> None:
        super().__init__(config, site)
        self.changes: list[Change] = []  # while attached: what was there before

    def rename(self, site: AttentionSite, config: Any, renaming: Renaming) -> None:
        names = [renaming(change.module) for change in self.changes]
        for change, name in zip(self.changes, names, strict=True):
            change.module = name
        super().rename(site, config, renaming)

    def plan(self, model: nn.Module) -> list[Change]:
        """What to exchange, worked out without touching the model.

        Raises:
            ValueError, NotImplementedError: it cannot be done on this model.
        """
        raise NotImplementedError(f"{type(self).__name__} must define plan(model).")

    def prepare(self, model: nn.Module) -> None:
        changes = self.plan(model)
        if changes and self.site.inline:
            raise NotImplementedError(
                f"{self.site.module_class} ({self.site.name}) cannot be cut into heads: it computes attention in its "
                "own code, which may rely on its shapes. Leave it out with modules=... or layers=..."
            )
        self.changes = changes

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        return inner(call)

    def check_plain(self) -> None:
        """NotImplementedError if no configuration describes the shapes that it leaves, as `fold` says it."""

    def fold(self, plain: nn.Module) -> None:
        """The weights and shapes that it leaves are all there is to it."""

    def exchange(self, model: nn.Module) -> None:
        for change in self.changes:
            change.exchange(model)

    def check_undo(self, model: nn.Module) -> None:
        for change in self.changes:
            change.check_undo(model, type(self).__name__)

    def train(self, mode: bool = True) -> Self:
        for change in self.changes:
            if isinstance(change.value, nn.Module):
                change.value.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Moves and casts of the model reach what was taken out, too."""
        for change in self.changes:
            value = change.value
            if _is_meta(value):
                continue
            if isinstance(value, nn.Module):
                value._apply(fn)
            elif isinstance(value, nn.Parameter):
                value.data = fn(value.data)
        return super()._apply(fn, recurse)


def _is_meta(value: Any) -> bool:
    """Whether something taken out of a model has parameters without values."""
    if isinstance(value, nn.Module):
        return any(parameter.is_meta for parameter in value.parameters())
    return isinstance(value, nn.Parameter) and value.is_meta
