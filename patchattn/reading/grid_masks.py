"""Variants of vision towers: what of its image each token sees."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..core.call import AttentionCall
from ..core.grid import Grid, unknown_grid
from ..core.host import find_sites
from ..core.patch_embedding import patch_embedding
from ..core.sites import AttentionSite
from ..core.variant import ALL_CAPABILITIES, Attend, AttentionOutput, Variant
from .grid_tiles import Seen, Tiling, attend_tiles, pairs, tilings
from .selection import density

# What towers of patches are: encoders, without a kv cache.
CAPABILITIES: frozenset[str] = ALL_CAPABILITIES - {"causal", "cross", "kv_cache", "static_cache"}


class GridVariant(Variant):
    """A variant that acts where tokens are patches of images; the other modules of a model are left out."""

    needs_grid = True

    @property
    def is_identity(self) -> bool:
        """Whether it has the neutral settings, of which every such variant has some."""
        return all(getattr(self.config, name) == value for name, value in self.neutral_config().items())

    @classmethod
    def fit(cls, config: Any, model: nn.Module, sites: Sequence[AttentionSite]) -> tuple[Any, Sequence[AttentionSite]]:
        names = [site.name for site in find_sites(model)]
        chosen, reasons = [], []
        for site in sites:
            if site.is_cross or getattr(model.get_submodule(site.name), "is_causal", False):
                continue
            try:
                patch_embedding(model, site, names)
            except NotImplementedError as error:
                reasons.append(error)
            else:
                chosen.append(site)
        if not chosen:
            because = f" {reasons[0]}" if reasons else ""
            raise NotImplementedError(
                f"{cls.__name__} needs a vision tower: none of the chosen attention modules of {type(model).__name__} "
                f"attends over patches of images.{because}"
            )
        return config, chosen


class GridMaskVariant(GridVariant):
    """A variant whose patches see a part of their image, by rows and columns: a subclass gives `config_class`, `sees`.

    Tokens that are no patches, such as a class token or registers, see all and are seen by all. Where it is much less
    work, attention is computed in tiles of tokens that see the same, or nearly so; else under a mask. Tokens of other
    images in the same row of a batch stay as hidden as they were.

    Reports `density` `(B or 1, Tq)`, with heads `(B or 1, Tq, H)` where they differ: keys read over keys seen.
    """

    def sees(self, rows: int, columns: int) -> Sequence[Seen]:
        """What patches see of an image of so many rows and columns, by neighbouring query heads.

        Raises:
            ValueError: such an image does not fit the settings.
        """
        raise NotImplementedError(f"{type(self).__name__} must define sees(rows, columns).")

    def rule(self, call: AttentionCall) -> torch.Tensor | None:
        is_tiled = self._tilings(call) is not None
        if is_tiled and not self.observers:
            return None
        keep = self._keep(call)
        if self.observers:
            self.report(call, density=density(call, call.seeing(keep)))
        return None if is_tiled else keep

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        tiled = self._tilings(call)
        return inner(call) if tiled is None else (attend_tiles(call, tiled), None)

    def _seen(self, grid: Grid) -> tuple[Seen, ...] | None:
        """What is seen of images of one size; `None`: everything."""
        rows, columns = grid.shape or (0, 0)
        seen = grid.once((self.config, self.site.layer_index), lambda: tuple(self.sees(rows, columns)))
        return None if all(one.is_all for one in seen) else seen

    def _tilings(self, call: AttentionCall) -> tuple[Tiling, ...] | None:
        """How this call is computed in tiles, if it is."""
        if not (call.stands_alone and is_plain(call)):
            return None
        grid = call.grid()
        seen = self._seen(grid) if _is_one_image(grid) else None
        if seen is None:
            return None
        own = self._keep(call) if call.mask.keeps else None  # which `rule` has put there, before another variant
        if any(keep is not own for keep in call.mask.keeps):
            return None
        heads, dtype = call.query.shape[1], call.query.dtype

        def make() -> tuple[Tiling, ...] | None:
            return tilings(seen, numbers(grid).argsort() + grid.prefix, grid.prefix, heads, dtype)

        return grid.once(("tiles", seen, heads, dtype), make)

    def _keep(self, call: AttentionCall) -> torch.Tensor | None:
        """`(B or 1, H or 1, T, T)` bool, or `None`: everything."""
        grid, heads = call.grid(), call.query.shape[1]
        if not _is_one_image(grid):
            kept = [self._keep_of_row(grid, row, heads) for row in range(len(grid.places))]
            most = max(map(len, kept))
            return torch.stack([keep.expand(most, -1, -1) for keep in kept])
        seen = self._seen(grid)
        if seen is None:
            return None

        def make() -> torch.Tensor:
            place = numbers(grid)
            keep = self._pairs(seen, heads, place.device)[:, place][:, :, place]
            return F.pad(keep, (grid.prefix, 0, grid.prefix, 0), value=True)[None]

        return grid.once(("mask", seen, heads), make)

    def _keep_of_row(self, grid: Grid, row: int, heads: int) -> torch.Tensor:
        """`(H or 1, T, T)` of a row of the batch, in which there may be several images, and padding."""
        places, extents, images = grid.places[row], grid.extents[row], grid.images[row]
        keep = ((images < 0) | (images < 0)[:, None])[None]
        for image in images.unique().tolist():
            if image < 0:
                continue
            tokens = (images == image).nonzero()[:, 0]
            rows, columns = extents[tokens[0]].tolist()
            numbers = places[tokens, 0] * columns + places[tokens, 1]
            if len(numbers) != rows * columns:
                raise unknown_grid(
                    self.site,
                    f"it attends over {len(numbers)} patches of an image of {rows} x {columns}, as in windows",
                )
            whole = self._pairs(self.sees(rows, columns), heads, numbers.device)[:, numbers][:, :, numbers]
            keep = keep.expand(len(whole), -1, -1).clone()
            keep[:, tokens[:, None], tokens] = whole
        return keep

    @staticmethod
    def _pairs(seen: Sequence[Seen], heads: int, device: torch.device) -> torch.Tensor:
        """`(H or 1, N, N)` bool, row by row."""
        if len(seen) == 1:
            return pairs(seen[0], device)[None]
        return torch.cat([pairs(one, device).expand(one.heads or heads, -1, -1) for one in seen])


def sizes_that_fit(rows: int, columns: int) -> str:
    """The end of an error message about a size that must divide the sides of an image."""
    fitting = [size for size in range(1, min(rows, columns) + 1) if rows % size == 0 and columns % size == 0]
    return f"Sizes that fit: {', '.join(map(str, fitting))}."


def shape_of_image(grid: Grid, site: AttentionSite) -> tuple[int, int]:
    """Rows and columns of patches, where every row of the batch is one whole image of one size.

    Raises:
        NotImplementedError: it is not.
    """
    if grid.shape is None or not _is_one_image(grid):
        raise unknown_grid(site, "it needs whole images of one size, one in each row of the batch")
    return grid.shape


def require_whole(call: AttentionCall, by: str) -> None:
    """NotImplementedError unless queries and keys of a call are all of the model's own tokens, and nothing else."""
    if call.context.rows is not None or call.context.of_some_keys or call.mask.extra:
        raise NotImplementedError(
            f"{by} needs all tokens of an image in {call.site.name}, of which a variant outside hands on some, "
            f"or to which it adds: patch {by} before it."
        )


def _is_one_image(grid: Grid) -> bool:
    """Whether rows of the batch are one whole image each, all of one size, as their numbers of tokens say."""
    return grid.shape is not None and grid.places.shape[:2] == (1, grid.prefix + grid.shape[0] * grid.shape[1])


def numbers(grid: Grid) -> torch.Tensor:
    """`(N,)` number of each patch of the one image, row by row."""
    places = grid.places[0, grid.prefix :]
    return places[:, 0] * (places[:, 1].max() + 1) + places[:, 1]


def is_plain(call: AttentionCall) -> bool:
    """Whether all queries and keys are there, no model hides some of them, and nothing is added to logits."""
    mask, around = call.mask, call.context
    limits = mask.pairs, mask.real_columns, mask.window, mask.sequence, mask.index, mask.fault, around.rows
    terms = (call.kwargs.get(name) for name in ("position_bias", "softcap", "s_aux"))
    is_whole = call.query.shape[2] == call.key.shape[2] and not (mask.extra or around.of_some_keys)
    return is_whole and not mask.causal and all(part is None for part in (*limits, *terms))
