"""Which axes of a tensor are sequences, heads, tokens and channels: followed back to the projection that made it.

An axis is the parts that it was put together from, slowest first, with the size of each. Parts of what a linear
projection has put out are heads and channels; all others were there before, and are sequences and tokens. So sequences
and heads that share an axis are told apart by where they come from, never by their numbers, which may be the same.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from .products import CASTS, MOVES, Layout, Step, any_in, tensors_in

# Where a part comes from: a tensor that nothing is known of, and which of its axes; or `None`, a projection's output.
Origin = tuple[torch.Tensor, int] | None
Axis = tuple[tuple[Origin, int], ...]
Axes = list[Axis]

_ALIKE = (*CASTS, "add", "add_", "sub", "mul", "mul_", "div", "div_", "dropout", "layer_norm", "rms_norm", "normalize")
_PARTS = ("unbind", "chunk", "split", "tensor_split")
_FOLLOWED = (*_ALIKE, *MOVES, *_PARTS, "linear", "transpose", "permute", "cat", "max", "__getitem__")


def is_followed(step: Step) -> bool:
    """Whether a call says which axes of what it gives are which of what it takes."""
    return step.name in _FOLLOWED


def axes_of(tensor: torch.Tensor, steps: Sequence[Step]) -> Axes:
    """The axes of a tensor, as far as the calls that made it tell."""
    for place in range(len(steps) - 1, -1, -1):
        if any_in([tensor], steps[place].results()):
            found = _after(steps[place], tensor, steps[:place])
            if found is not None:
                return found
            break
    return [() if size == 1 else (((tensor, dim), size),) for dim, size in enumerate(tensor.shape)]


def _after(step: Step, result: torch.Tensor, before: Sequence[Step]) -> Axes | None:
    """The axes of what a call gave; `None` if it does not tell."""
    if step.name in _ALIKE:
        taken = tensors_in((step.args, step.kwargs))
        like = next((each for each in taken if each.shape == result.shape), None)
        return None if like is None else axes_of(like, before)
    source = next(tensors_in(step.args), None)
    if source is None:
        return None
    axes = axes_of(source, before)
    if step.name == "linear":
        return [*axes[:-1], ((None, result.shape[-1]),) if result.shape[-1] > 1 else ()]
    if step.name in MOVES:
        return _regrouped(axes, result.shape)
    if step.name in ("transpose", "permute") and step.kwargs:
        return None
    if step.name == "transpose":
        first, second = (dim % len(axes) for dim in step.args[1:3])
        axes[first], axes[second] = axes[second], axes[first]
        return axes
    if step.name == "permute":
        order = step.args[1] if len(step.args) == 2 else step.args[1:]
        return [axes[dim] for dim in order]
    dropped = _dropped(step, source.dim())
    if dropped is None:
        return None
    axes = [axis for dim, axis in enumerate(axes) if dim not in dropped]
    return _resized(axes, result.shape) if len(axes) == result.dim() else None


def _dropped(step: Step, dims: int) -> set[int] | None:
    """The axes that are gone from what a call of one tensor gives; `None` if others may be as well."""
    if step.name in ("chunk", "split", "tensor_split", "cat"):
        return set()
    if step.name == "unbind":
        return {_argument(step, "dim", 0) % dims}
    if step.name == "max":
        dim = _argument(step, "dim", None)
        return {dim % dims} if isinstance(dim, int) and not step.kwargs.get("keepdim") else None
    index: Any = step.args[1]
    index = list(index) if isinstance(index, tuple) else [index]
    if any((each is not ... and not isinstance(each, int | slice)) or isinstance(each, bool) for each in index):
        return None
    if ... in index:
        place = index.index(...)
        index[place : place + 1] = [slice(None)] * (dims - len(index) + 1)
    return {dim for dim, each in enumerate(index) if isinstance(each, int)}


def _argument(step: Step, name: str, otherwise: Any) -> Any:
    return step.kwargs.get(name, step.args[1] if len(step.args) > 1 else otherwise)


def _regrouped(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """The axes of the same entries in another shape."""
    parts = [part for axis in axes for part in axis]
    found: Axes = []
    for size in shape:
        axis: list[tuple[Origin, int]] = []
        while size > 1 and parts:
            origin, has = parts.pop(0)
            if size % has != 0 and has % size != 0:
                return None
            own = min(size, has)
            axis.append((origin, own))
            if has > own:
                parts.insert(0, (origin, has // own))
            size //= own
        if size != 1:
            return None
        found.append(tuple(axis))
    return None if parts else found


def _resized(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """The axes where some are shorter or longer now: none that is of several parts."""
    found: Axes = []
    for axis, size in zip(axes, shape, strict=True):
        if math.prod([part for _, part in axis]) == size:
            found.append(axis)
        elif len(axis) == 1:
            found.append(((axis[0][0], size),) if size > 1 else ())
        else:
            return None
    return found


def layout_of(axes: Axes, shape: Sequence[int]) -> Layout | None:
    """How queries lie that have these axes and this shape; `None` if that does not tell heads from sequences."""
    *leading, rows, columns = axes
    if not _are_tokens(rows) or not _are_channels(columns):
        return None
    if len(leading) == 1:
        heads = [size for origin, size in leading[0] if origin is None]
        sequences = leading[0][: len(leading[0]) - len(heads)]
        return Layout(math.prod(heads)) if heads and _are_tokens(sequences) else None
    if len(leading) == 2 or not all(_are_tokens(axis) or _are_channels(axis) for axis in leading):
        return None
    of_sequences = [dim for dim, axis in enumerate(leading) if _are_tokens(axis)]
    of_heads = [dim for dim, axis in enumerate(leading) if _are_channels(axis)]
    if len(of_heads) > 1:
        return None
    order = (*of_sequences, *of_heads, len(axes) - 2, len(axes) - 1)
    return Layout(order=order, sequences=tuple(shape[dim] for dim in of_sequences))


def lead_by_sequence(axes: Axes) -> bool:
    """Whether sequences among the leading axes of queries are those of the first axis of what they are made of."""
    return all(origin is None or origin[1] == 0 for axis in axes[:-2] for origin, _ in axis)


def _are_channels(axis: Axis) -> bool:
    """Whether an axis is a part of what a projection has put out, and nothing else."""
    return bool(axis) and all(origin is None for origin, _ in axis)


def _are_tokens(axis: Axis) -> bool:
    """Whether nothing of an axis was put out by a projection."""
    return all(origin is not None for origin, _ in axis)
