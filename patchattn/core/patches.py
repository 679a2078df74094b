"""What the patch embedding and the rotary embedding of a vision tower did in the forward that runs."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(eq=False)
class Patches:
    """What the patch embedding of a vision tower did in the forward that runs.

    Attributes:
        sizes: rows and columns of its output, with the number of images before them; `None` of a linear one.
        tokens: sequences and tokens of what came out of it, prefix included; `None` where it added none itself.
        prefix: how many tokens it put before the patches; `None` with a `fault`.
        fault: why the order of its tokens is not known.
        shapes: `(B, 2)` rows and columns of each image, as a tower of images of several sizes is told.
        places: `(N, 2)` row and column of each token of all images in one row, as a rotary embedding is told.
        turned: what the rotary embedding made of these, tensors of N rows.
        marks: `(N,)` bool, patches that are to be made NaN, while the order of tokens is looked for.
        packed: what is worked out of places once, and the rotary embedding that it was worked out of.
        made: what variants have made of the grid of images of one size (`Grid.once`).
    """

    sizes: tuple[int, int, int] | None = None
    tokens: tuple[int, int] | None = None
    prefix: int | None = None
    fault: str | None = None
    shapes: torch.Tensor | None = None
    places: torch.Tensor | None = None
    turned: tuple[torch.Tensor, ...] = ()
    marks: torch.Tensor | None = None
    packed: "tuple[tuple[torch.Tensor, ...], Packed] | None" = field(default=None, repr=False)
    made: dict[Hashable, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, eq=False)
class Packed:
    """All images of a batch in one row: `(N, 2)` places and extents, `(N,)` images."""

    places: torch.Tensor
    extents: torch.Tensor
    images: torch.Tensor
