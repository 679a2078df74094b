"""What a patch of an image sees under a variant, without a model: by layers and heads where those differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..core.registry import list_variants, variant_info
from ..core.sites import AttentionSite
from ..reading.grid_masks import GridMaskVariant
from ..reading.grid_tiles import Seen


@dataclass(frozen=True, eq=False)
class GridMask:
    """What one patch sees.

    Attributes:
        name: where, such as `layer 1, heads 0 to 2`.
        query: row and column of the patch.
        seen: `(rows, columns)` bool: the patches that it sees.
    """

    name: str
    query: tuple[int, int]
    seen: torch.Tensor


def grid_masks(
    variant: str,
    settings: Mapping[str, Any] | None = None,
    *,
    shape: tuple[int, int],
    query: tuple[int, int],
    layers: Sequence[int] = (0, 1),
    heads: int = 12,
) -> list[GridMask]:
    """What a patch sees, in some layers.

    Args:
        variant: its name; one whose masks do not depend on what is in the image.
        settings: of the variant.
        shape: rows and columns of patches of the image.
        query: row and column of the patch.
        layers: numbers of layers.
        heads: number of query heads, for variants that differ between them.

    Returns:
        A mask for each layer, or for each group of heads in it where they differ.

    Raises:
        ValueError: another sort of variant, a patch that is not there, or settings that do not fit the image.
    """
    info = variant_info(variant)
    if not issubclass(info.variant, GridMaskVariant):
        drawn = [name for name in list_variants() if issubclass(variant_info(name).variant, GridMaskVariant)]
        raise ValueError(
            f"{variant!r} has no masks over rows and columns that are there before the image is: choose one of "
            f"{', '.join(drawn)}."
        )
    (rows, columns), (row, column) = shape, query
    if not (0 <= row < rows and 0 <= column < columns):
        raise ValueError(f"There is no patch in row {row} and column {column} of {rows} x {columns}, counted from 0.")
    config, found = info.configure(settings), []
    for layer in layers:
        start = 0
        seen = info.variant(config, _site(layer, heads)).sees(rows, columns)
        for one in seen:
            end = start + (one.heads or heads)
            where = f", heads {start} to {end - 1}" if end - start > 1 else f", head {start}"
            found.append(GridMask(f"layer {layer}{where if len(seen) > 1 else ''}", query, _of(one, row, column)))
            start = end
    return found


def _of(seen: Seen, row: int, column: int) -> torch.Tensor:
    mask = torch.zeros(len(seen.rows), len(seen.columns), dtype=torch.bool)
    mask[torch.tensor(seen.rows[row])[:, None], torch.tensor(seen.columns[column])] = True
    return mask


def _site(layer: int, heads: int) -> AttentionSite:
    """An attention module of no model."""
    return AttentionSite(
        name=f"layer {layer}",
        tower="",
        layer_index=layer,
        layer_count=layer + 1,
        module_class="",
        is_cross=False,
        query_heads=heads,
        kv_heads=heads,
        head_dim=None,
        input_size=None,
        memory_size=None,
        projections={},
        projection_sizes={},
        query_norm=None,
        input_argument="",
        memory_argument=None,
        mask_argument=None,
        arguments=(),
        max_positions=None,
    )
