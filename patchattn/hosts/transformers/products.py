"""Products of two activations as attention modules write them, and how queries, keys and heads lie in what they take.

A product is told by what torch calls its function, and its axes by shapes of views and letters of `einsum`: never by a
size alone, for the number of tokens may be that of heads.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

_MATMULS = ("matmul", "__matmul__", "bmm")
CASTS = ("contiguous", "clone", "to", "float", "half", "bfloat16", "double", "type", "type_as")
MOVES = ("view", "reshape", "flatten", "unflatten")  # none of them moves an entry past another


class UnknownPatternError(Exception):
    """Attention is computed in another way than is known; the text says how."""


@dataclass(frozen=True)
class Layout:
    """How a tensor lies that holds `(B, H, rows, columns)`.

    Attributes:
        heads: of a tensor of three dimensions, the first of which is of sequences and, faster, of heads.
        order: of a tensor of four dimensions or more, which of them come first, second and so on, columns last.
        sequences: of a tensor of five dimensions or more, the sizes of those of sequences, which come first; that of
            heads is next, where there is one.
        turned: whether columns come before rows.
    """

    heads: int | None = None
    order: tuple[int, ...] | None = None
    sequences: tuple[int, ...] | None = None
    turned: bool = False

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """`(B, H, rows, columns)` of it."""
        if self.heads is not None:
            tensor = tensor.unflatten(0, (-1, self.heads))
        if self.order is not None:
            tensor = tensor.permute(self.order)
        if self.sequences is not None:
            tensor = tensor.reshape(math.prod(self.sequences), -1, *tensor.shape[-2:])
        return tensor.mT if self.turned else tensor

    def written(self, tensor: torch.Tensor) -> torch.Tensor:
        """The inverse of `read`."""
        if self.turned:
            tensor = tensor.mT
        if self.sequences is not None and self.order is not None:
            own = tensor.shape[1:] if len(self.order) == len(self.sequences) + 3 else tensor.shape[2:]
            tensor = tensor.reshape(*self.sequences, *own)
        if self.order is not None:
            tensor = tensor.permute([self.order.index(axis) for axis in range(len(self.order))])
        return tensor.flatten(0, 1) if self.heads is not None else tensor


@dataclass(eq=False)
class Step:
    """One call of a function of torch.

    Attributes:
        func, args, kwargs: the call.
        result: what it gave.
    """

    func: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    result: Any = None

    @property
    def name(self) -> str:
        """Of the function, in torch."""
        return str(getattr(self.func, "__name__", ""))

    def results(self) -> list[torch.Tensor]:
        """The tensors that it gave, or wrote into."""
        return list(tensors_in(self.args[0] if self.name == "__setitem__" else self.result))

    def again(self, exchanged: "Exchanged") -> Any:
        """The same call with other tensors."""
        return self.func(*exchanged.of(tuple(self.args)), **exchanged.of(dict(self.kwargs)))


class Exchanged:
    """Tensors, and what is taken in their place. Found by identity, which compiled code knows no numbers of."""

    def __init__(self, *pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
        self._pairs = list(pairs)

    def take(self, old: torch.Tensor, new: torch.Tensor) -> None:
        """From here on, `new` in the place of `old`."""
        self._pairs = [pair for pair in self._pairs if pair[0] is not old]
        self._pairs.append((old, new))

    def has(self, value: Any) -> bool:
        """Whether something of it is exchanged."""
        return any_in(list(tensors_in(value)), [old for old, _ in self._pairs])

    def of(self, value: Any) -> Any:
        """It, in tuples, lists and dictionaries too, with the new tensors."""
        if isinstance(value, torch.Tensor):
            return next((new for old, new in self._pairs if old is value), value)
        if isinstance(value, dict):
            return {key: self.of(item) for key, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)([self.of(item) for item in value])
        return value


def any_in(tensors: Sequence[torch.Tensor], known: Sequence[torch.Tensor]) -> bool:
    """Whether one of some tensors is one of others."""
    return any(tensor is other for tensor in tensors for other in known)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in tuples, lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)


@dataclass(frozen=True, eq=False)
class Product:
    """A product of matrices, one for every sequence and head.

    Attributes:
        step: the call.
        left, right: what it multiplies.
        letters: of `einsum`: those of both, and of the result.
    """

    step: Step
    left: torch.Tensor
    right: torch.Tensor
    letters: tuple[str, str, str] | None = None

    @classmethod
    def of(cls, step: Step) -> "Product | None":
        """What a call multiplies; `None` unless that is two activations, of three dimensions at least."""
        letters = None
        if step.name in _MATMULS:
            both = [*step.args, *step.kwargs.values()]
        elif step.name == "baddbmm":
            both = [*step.args, *(step.kwargs[name] for name in ("batch1", "batch2") if name in step.kwargs)][1:]
        elif step.name == "einsum" and step.args and isinstance(step.args[0], str):
            both = list(tensors_in(tuple(step.args[1:])))
            before, _, after = step.args[0].replace(" ", "").partition("->")
            letters = (*before.split(","), after)
        else:
            return None
        matrices = [each for each in both if isinstance(each, torch.Tensor) and each.dim() > 2]
        if len(both) != 2 or len(matrices) != 2 or any(isinstance(each, nn.Parameter) for each in matrices):
            return None
        if letters is not None and len(letters) != 3:
            return None
        return cls(step, matrices[0], matrices[1], letters)

    def again(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """The same product of others."""
        result: torch.Tensor = self.step.again(Exchanged((self.left, left), (self.right, right)))
        return result

    def layouts(self, told: Layout | None, *, of_scores: bool) -> tuple[Layout, Layout, Layout]:
        """How what it takes and what it gives lie.

        Args:
            told: how queries lie, for a product that has not four dimensions; `None` if that was not seen.
            of_scores: queries times keys, both as `(rows, D)`; else weights times values.

        Raises:
            UnknownPatternError: neither its shapes nor its letters tell.
        """
        if self.letters is not None:
            return self._layouts_by_letters(self.letters, of_scores)
        dims = (self.left.dim(), self.right.dim())
        if dims == (4, 4):
            return Layout(), Layout(turned=of_scores), Layout()
        is_told = told is not None and self.left.shape[:-2] == self.right.shape[:-2]
        if told is not None and is_told and dims[0] == (3 if told.order is None else len(told.order)):
            return told, replace(told, turned=of_scores), told
        raise UnknownPatternError(f"heads are not told apart from sequences in a product of {dims} dimensions")

    def _layouts_by_letters(self, letters: tuple[str, str, str], of_scores: bool) -> tuple[Layout, Layout, Layout]:
        left, right, result = letters
        summed = [letter for letter in left if letter in right and letter not in result]
        shared = [letter for letter in result if letter in left and letter in right]
        row = [letter for letter in left if letter in result and letter not in right]
        column = [letter for letter in right if letter in result and letter not in left]
        counts = [len(each) for each in (summed, shared, row, column)]
        if counts != [1, 2, 1, 1] or not len(left) == len(right) == len(result) == len(set(result)) == 4:
            raise UnknownPatternError(f"einsum of {','.join((left, right))}->{result}")
        own = [[*shared, *row, *summed], [*shared, *(column + summed if of_scores else summed + column)]]
        orders = [
            tuple(place.index(letter) for letter in letters)
            for place, letters in zip((left, right, result), (*own, [*shared, *row, *column]), strict=True)
        ]
        return Layout(order=orders[0]), Layout(order=orders[1]), Layout(order=orders[2])
