"""What is known of a forward of a whole model, between the hooks that come to know it and the attention that asks.

A hook further up notes it in the run of its thread (`current_run`). From the language model on it goes down with the
calls, as the keyword argument `RUN` that layers hand on to their attention: activation checkpointing runs layers again
in `backward`, in another thread on a GPU, when the run of the forward is over and the hooks around them do not run.
"""

import threading
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .patches import Patches
from .ranks import Told

RUN = "patchattn_run"
RESIDUAL = "residual"
_NO_BASE: tuple[Any, str] = (None, "")
_local = threading.local()  # .run: the innermost one of this thread


@dataclass(eq=False)
class ModelRun:
    """One forward.

    Attributes:
        token_ids: `(B', T)` ids that the input embedding was called with, until the language model is.
        facts: `(B, T, ...)` of every token of the language model's input, by name: what mechanisms hand down to
            attention, such as which tokens are image tokens, or the residual stream.
        branch: which branch of a decoding variant: 0 is the model itself, branches are counted from 1.
        asked: the logits of so many last tokens are asked for; 0: of all, or of chosen ones. Of the model itself only
            where a variant has it noted.
        told: what the modules that make masks were told of the tokens, innermost last.
        masks: those that calls of attention were seen to have since the last of these modules began or ended, by what
            they were read off, for the layers to come.
        base: a configuration, and the base implementation that it was seen to name since.
        patches: what the vision tower that runs has made of its images, where a variant asks for grids.
        notes: what a mechanism keeps from one of its hooks to the next, by its name.
        shared: what hooks on one layer keep for those on later ones, by name; it goes down with the calls.
    """

    token_ids: torch.Tensor | None = None
    facts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    branch: int = 0
    asked: int = 0
    told: tuple[Told, ...] = ()
    masks: dict[Hashable, Any] = field(default_factory=dict)
    base: tuple[Any, str] = _NO_BASE
    patches: Patches | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)

    def handed_down(self, facts: Mapping[str, torch.Tensor]) -> "ModelRun":
        """What goes down with the calls, with more facts: it lives as long as backward may run them again, so that
        notes are left out."""
        return replace(self, token_ids=None, notes={}, facts={**self.facts, **facts})

    @property
    def is_over(self) -> bool:
        """Whether nobody has anything in it any more; a branch ends where it was begun (`running`)."""
        return not (self.notes or self.told or self.branch) and self.patches is None and self.token_ids is None


def current_run() -> ModelRun:
    """The innermost run of this thread; a new one where there is none."""
    run: ModelRun | None = getattr(_local, "run", None)
    if run is None:
        run = _local.run = ModelRun()
    return run


def run_of(kwargs: Mapping[str, Any]) -> ModelRun:
    """The run that something is called in, to read: what was handed down to it, else that of this thread, else an
    empty one, which nobody keeps."""
    run: ModelRun | None = kwargs.get(RUN)
    return run or getattr(_local, "run", None) or ModelRun()


def end_run(*notes: str) -> None:
    """Let go of what a mechanism has noted of the forward that ends here: the ids, and notes by their names.

    For a `finally` hook of the whole model, which may run before others that read theirs. A branch ends where it was
    begun (`running`).
    """
    run: ModelRun | None = getattr(_local, "run", None)
    if run is not None and not run.branch:
        run.token_ids = None
        forget(*notes)


def forget(*notes: str) -> None:
    """Let go of notes by their names, and of a run that has nothing else: for a `finally` hook of a part of a model."""
    run: ModelRun | None = getattr(_local, "run", None)
    if run is None:
        return
    for name in notes:
        run.notes.pop(name, None)
    if run.is_over:
        _local.run = None


def note_told(told: Told) -> None:
    """A module that makes masks begins, and was told that."""
    run = current_run()
    run.told, run.masks, run.base = (*run.told, told), {}, _NO_BASE


def forget_told() -> None:
    """It ends."""
    run = current_run()
    run.told, run.masks, run.base = run.told[:-1], {}, _NO_BASE
    if run.is_over:
        _local.run = None


@contextmanager
def running(run: ModelRun) -> Iterator[None]:
    """A forward within another one, which goes on behind it."""
    outer = getattr(_local, "run", None)
    _local.run = run
    try:
        yield
    finally:
        _local.run = outer
