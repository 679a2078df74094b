"""The rotary embedding of an attention module: queries and keys are turned from one position to another.

How a module rotates is found by looking (`looking.py`) and held as data (`Rotation`). What it rotates by is asked of a
copy of the model's own module (`Rotary`), so that whatever scaling that has is undone to the last digits.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..core.call import AttentionCall
from ..core.settings import Settings, option

ROTATED_BY = "rotated_by"  # a fact of keys: the position that each was rotated by
Plain = str | int | float | bool | None
Given = Plain | list[Plain]  # an argument that a patch can be saved with


@dataclass(frozen=True, kw_only=True)
class Rotation(Settings):
    """How one attention module rotates queries and keys: plain data, which is saved with a patch."""

    share: Literal["first", "last", "none"] = option(
        help="Which dimensions of a head are rotated, where not all are.", choices=("first", "last", "none")
    )
    layout: Literal["half", "interleaved"] = option(
        "half", help="Which of them make a pair: c and c + r/2, or 2c and 2c + 1.", choices=("half", "interleaved")
    )
    form: Literal["pairs", "halves", "neighbours"] = option(
        "pairs",
        help="The model's tables have each angle once, or twice: one half after the other, or side by side.",
        choices=("pairs", "halves", "neighbours"),
    )
    module: tuple[str, ...] = option((), help="Path of the module that gives these tables, alone in a list.")
    hidden: str | None = option(None, help="Argument of that module whose dtype and device the tables have.")
    positions: str = option("", help="Argument of that module that holds positions.")
    given: dict[str, Given] = option({}, help="Other arguments of that module.")
    told: str = option("", help="Argument of the attention function that holds the positions of its queries.")
    border: int | None = option(
        None, help="Length of text, in tokens, from which on the tables depend on the longest one.", minimum=1
    )


Rotations = dict[str, dict[str, Plain | list[str] | dict[str, Given]]]  # as `to_dict` gives them, by attention module


def parse_rotations(given: Any) -> Rotations:
    """`Rotation`s by name of the attention module, as a setting holds them.

    Raises:
        TypeError, ValueError: they are something else.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"How attention modules rotate is told by their names, got {type(given).__name__}.")
    return {str(name): Rotation.from_dict(rotation).to_dict() for name, rotation in given.items()}


class Rotary(nn.Module):
    """Turns queries and keys of one attention module, by a copy of the model's module that rotates them.

    Args:
        rotation: how the attention module rotates.
        model: whose modules are meant.

    Raises:
        ValueError: the model has no such module.
    """

    def __init__(self, rotation: Rotation, model: nn.Module) -> None:
        super().__init__()
        self.rotation = rotation
        self.module: nn.Module | None = None
        if rotation.share == "none":
            return
        try:
            (path,) = rotation.module
            self.module = copy.deepcopy(model.get_submodule(path))
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"{type(model).__name__} has no module {', '.join(rotation.module) or 'at all'} that rotates queries "
                "and keys, as the saved patch says: leave out the setting 'rotary', and it is looked for."
            ) from error

    @property
    def is_rotated(self) -> bool:
        """Whether there is anything to turn: some layers of some models do without."""
        return self.module is not None

    def tables(self, positions: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines `(..., T, r / 2)`, of length 1, of positions `(..., T)`.

        Raises:
            NotImplementedError: the model would rotate so long a text by other frequencies, or may.
        """
        if self.module is None:
            raise ValueError("Nothing is rotated here, so that there are no tables.")
        self._check(positions)
        rotation, flat = self.rotation, positions.reshape(-1, positions.shape[-1])
        asked = {**rotation.given, rotation.positions: flat}
        if rotation.hidden is not None:
            asked[rotation.hidden] = torch.zeros(1, 1, 1, device=positions.device)
        cos, sin = (_angles(table.to(dtype), rotation.form) for table in self.module(**asked))
        length = torch.hypot(cos, sin)  # what the model scales them by
        shape = (*positions.shape, cos.shape[-1])
        return (cos / length).expand(len(flat), -1, -1).view(shape), (sin / length).expand(len(flat), -1, -1).view(
            shape
        )

    def turned(
        self,
        x: torch.Tensor,
        old: torch.Tensor,
        new: torch.Tensor,
        frequencies: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Queries or keys as they would be at other positions: one rotation in float32 at least, from the stored one.

        Args:
            x: `(B, h, T, D)`, rotated by the model.
            old: `(B or 1, T)`, or by head `(B or 1, 1 or h, T)`: the positions they were rotated by.
            new: those they are wanted at, likewise, or `(B or 1, 1)` the same of all.
            frequencies: `(r / 2,)` other ones, in radians per position, by which the new rotation is.

        Raises:
            NotImplementedError: as `tables`.
        """
        if self.module is None:
            return x
        dtype = torch.promote_types(x.dtype, torch.float32)
        cos, sin = self.tables(_by_head(old), dtype)
        if frequencies is None:
            new_cos, new_sin = self.tables(_by_head(new), dtype)
        else:
            angles = _by_head(new)[..., None].to(dtype) * frequencies.to(dtype)
            new_cos, new_sin = angles.cos(), angles.sin()
        return self.rotated(x, new_cos * cos + new_sin * sin, new_sin * cos - new_cos * sin)

    def rotated(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """`(..., D)` turned by angles whose cosines and sines are `(..., r / 2)`, in the dtype that `x` has."""
        count = cos.shape[-1]
        start = x.shape[-1] - 2 * count if self.rotation.share == "last" else 0
        part = x[..., start : start + 2 * count].to(cos.dtype)
        if self.rotation.layout == "half":
            one, other = part[..., :count], part[..., count:]
        else:
            one, other = part[..., ::2], part[..., 1::2]
        turned = one * cos - other * sin, other * cos + one * sin
        part = torch.cat(turned, -1) if self.rotation.layout == "half" else torch.stack(turned, -1).flatten(-2)
        if part.shape == x.shape:
            return part.to(x.dtype)
        return torch.cat([x[..., :start], part.to(x.dtype), x[..., start + 2 * count :]], -1)

    def rotated_by(self, call: AttentionCall) -> torch.Tensor:
        """`(B or 1, Tq)` the positions that the queries of a call were rotated by; see `AttentionCall.query_positions`.

        Raises:
            NotImplementedError: the call does not say them, one to a token.
        """
        told, rows = call.kwargs.get(self.rotation.told), call.query.shape[2]
        shape = tuple(told.shape) if isinstance(told, torch.Tensor) else told
        if not isinstance(told, torch.Tensor) or shape not in ((1, rows), (len(call.query), rows)):
            raise NotImplementedError(
                f"{call.site.module_class} ({call.site.name}) was not told what position each of its {rows} queries is "
                f"rotated by: {self.rotation.told} is {shape}, expected ({len(call.query)} or 1, {rows}) integers."
            )
        return told.to(call.query.device).long()

    def _check(self, positions: torch.Tensor) -> None:
        border = self.rotation.border
        if border is None:
            return
        reason = "compiled code cannot ask how long the text is" if torch.compiler.is_compiling() else None
        if reason is None and positions.numel() and (last := int(positions.max())) + 1 >= border:
            reason = f"position {last} is asked for"
        if reason is not None:
            raise NotImplementedError(
                f"From {border} tokens on the model's rotary embedding ends, or depends on the length of the text "
                "(dynamic NTK, longrope), so that keys stored before are rotated by other frequencies; and "
                f"{reason}. Keep the text shorter, or load the model with another rope_type in its configuration."
            )


def _by_head(positions: torch.Tensor) -> torch.Tensor:
    return positions[:, None] if positions.dim() == 2 else positions


def _angles(table: torch.Tensor, form: str) -> torch.Tensor:
    """Each angle's entry once."""
    if form == "halves":
        return table[..., : table.shape[-1] // 2]
    return table[..., ::2] if form == "neighbours" else table
