"""What a model is told of its tokens: the mask `(B, T)` of text and padding that the masks of its layers are made of.

Those say which keys queries see, and no longer which of the others were text: behind a sliding window padding looks as
hidden text does. So the modules that make masks have hooks, which note what they were given in the run of the model.
"""

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import masking_utils

from ...core import run
from ...core.hooks import register_last
from ...core.kv_caches import append_in_place
from ...core.ranks import NOTHING_TOLD, Told
from .sites import MASK_ARGUMENTS, attention_forward, names_in

# By module class: positions and names of the arguments that masks are made of; `None` of one that makes none.
_makers: dict[type[nn.Module], dict[str, int] | None] = {}
_POSITIONS = "position_ids"


def watch_masks(model: nn.Module, site_name: str) -> None:
    """Place the hooks on the modules around an attention module that make masks; once on each."""
    parts = site_name.split(".")
    for count in range(len(parts)):
        module = model.get_submodule(".".join(parts[:count]))
        if mask_arguments(type(module)) is not None and note_told not in module._forward_pre_hooks.values():
            register_last(module, note_told)
            module.register_forward_hook(forget_told, always_call=True)


def note_told(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pre-hook of a module that makes masks: note what they are made of; from now on its kv cache appends in place.

    One that is given masks made already goes by what the module around it was told, if that made them. Transformers
    packs sequences by position ids that start anew, and only where it is given no mask; chunked attention then looks
    the same but for these.
    """
    append_in_place((*args, *kwargs.values()))
    given = {
        name: kwargs[name] if name in kwargs else args[position] if position < len(args) else None
        for name, position in (mask_arguments(type(module)) or {}).items()
    }
    positions = given.pop(_POSITIONS, None)
    mask = next(iter(given.values()), None)
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        told = Told(mask, restarts=False)
    elif mask is not None:
        before = run.run_of({}).told
        told = before[-1] if before else NOTHING_TOLD
    elif isinstance(positions, torch.Tensor) and positions.dim() == 2:
        told = Told("all", F.pad(positions.diff(dim=-1) != 1, (1, 0)))
    else:
        told = Told("all", restarts=positions is not None)
    run.note_told(told)


def forget_told(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Post-hook of the same module, called also where it failed."""
    run.forget_told()


def mask_arguments(module_class: type[nn.Module]) -> dict[str, int] | None:
    """The parameters of `forward` that a module class makes masks of, with their positions; `None` if it makes none."""
    if module_class not in _makers:
        forward = attention_forward(module_class)
        names = list(inspect.signature(forward).parameters)[1:]
        mask = next((name for name in names if name in MASK_ARGUMENTS), None)
        makes = mask is not None and _makes_masks(forward, module_class, set())
        wanted = (name for name in (mask, _POSITIONS) if name in names)
        _makers[module_class] = {str(name): names.index(str(name)) for name in wanted} if makes else None
    return _makers[module_class]


def _makes_masks(function: Any, module_class: type[nn.Module], asked: set[Any]) -> bool:
    """Whether a function calls one of transformers' that makes masks, itself or by a helper of its file or class."""
    if not isinstance(function, FunctionType) or function in asked:
        return False
    asked.add(function)
    for name in names_in(function.__code__):
        called: Callable[..., Any] | None = function.__globals__.get(name, getattr(module_class, name, None))
        home = getattr(called, "__module__", None)
        if home == masking_utils.__name__ and not inspect.isclass(called):
            return True
        if home == function.__module__ and _makes_masks(called, module_class, asked):
            return True
    return False
