"""Where the tokens of a vision tower lie on their images, told by its patch embedding and its rotary embedding."""

import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from .mask import Mask
from .patches import Packed, Patches
from .sites import AttentionSite
from .surroundings import Surroundings

Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the tokens of one call of attention lie on their images.

    Attributes:
        prefix: how many of the first tokens are not patches: a class or distillation token, registers.
        shape: rows and columns of patches, where every image of the call has as many; `None` where they differ.
        places: `(B or 1, T, 2)` row and column of each token, -1 of those that are not patches, prefix or padding.
        extents: `(B or 1, T, 2)` rows and columns of the image that each token is of, 0 of those that are not patches.
        images: `(B or 1, T)` which image of its row of the batch each token is of, a frame of a video counting as one;
            -1 of those that are not patches.
        made: what `once` has made of it; calls of a forward on images of one size share it.
    """

    prefix: int
    shape: tuple[int, int] | None
    places: torch.Tensor
    extents: torch.Tensor
    images: torch.Tensor
    made: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gives, made once for all layers of a forward; compiled code makes it anew.

        Args:
            key: what it is, told from all else that is made of a grid.
            make: makes it of prefix and shape, where all images have one, on the device of places.
        """
        return _once(self.made, (self.prefix, self.shape, self.places.device, key), make)


def _once(made: dict[Hashable, Any], key: Hashable, make: Callable[[], Made]) -> Made:
    if torch.compiler.is_compiling():
        return make()
    if key not in made:
        made[key] = make()
    found: Made = made[key]
    return found


def grid_of(patches: Patches | None, around: Surroundings, mask: Mask) -> Grid:
    """The grid of a call, from what is known of its forward.

    Raises:
        NotImplementedError: it is not known, with the reason.
    """
    if around.site.is_cross:
        raise unknown_grid(around.site, "it attends to another sequence")
    if patches is None:
        raise unknown_grid(
            around.site,
            "no patch embedding before it was seen in this forward, or its layer, run again by activation "
            "checkpointing, was not handed what was seen",
        )
    given = _given(patches, around) if patches.places is not None else ()
    if patches.places is not None and (given or patches.prefix is None):
        return _of_places(patches, patches.places, given, around)
    if patches.fault is not None:
        raise unknown_grid(around.site, patches.fault)
    return _of_shapes(patches, around, mask) if patches.sizes is None else _of_sizes(patches, around)


def unknown_grid(site: AttentionSite, reason: str) -> NotImplementedError:
    """The refusal to tell where the tokens of an attention module lie."""
    return NotImplementedError(
        f"{site.module_class} ({site.name}) has no grid of patches that is known: {reason}. Leave it out with "
        "modules=... or layers=..."
    )


def _of_sizes(patches: Patches, around: Surroundings) -> Grid:
    """Of images of one size."""
    images, rows, columns = patches.sizes or (0, 0, 0)
    prefix = _prefix(patches, around)
    if patches.tokens != (images, prefix + rows * columns):
        raise unknown_grid(
            around.site,
            f"its patch embedding made {rows} x {columns} patches of each of {images} images, and {patches.tokens} "
            "sequences and tokens of these",
        )
    device = around.query.device
    return _once(
        patches.made,
        ("grid", prefix, rows, columns, device),
        lambda: _of_one_size(prefix, rows, columns, patches.made, device),
    )


def _of_one_size(prefix: int, rows: int, columns: int, made: dict[Hashable, Any], device: torch.device) -> Grid:
    place = torch.arange(rows * columns, device=device)
    places = torch.stack([place // columns, place % columns], dim=-1)
    extents = torch.tensor([rows, columns], device=device).expand_as(places)
    skipped = [places.new_full((prefix, 2), value) for value in (-1, 0)]
    all_places = torch.cat([skipped[0], places])[None]
    all_extents = torch.cat([skipped[1], extents])[None]
    return Grid(prefix, (rows, columns), all_places, all_extents, all_places[..., 0].clamp(max=0), made)


def _of_shapes(patches: Patches, around: Surroundings, mask: Mask) -> Grid:
    """Of images of several sizes, one in each row of the batch, padded behind."""
    if torch.compiler.is_compiling():
        raise unknown_grid(around.site, "the images differ in size, which compiled code cannot ask for")
    prefix = _prefix(patches, around)
    if patches.shapes is None or patches.tokens is None or len(patches.shapes) != patches.tokens[0]:
        raise unknown_grid(
            around.site, "its patches come as rows of numbers, without the rows and columns of each image"
        )
    (batch, count), device = patches.tokens, around.query.device
    shapes = patches.shapes.to(device).long()
    lengths, place = shapes.prod(-1), torch.arange(count - prefix, device=device)
    is_patch = place < lengths[:, None]
    real = mask.real().expand(batch, count)[:, prefix:]
    if not bool((real == is_patch).all()):
        raise unknown_grid(
            around.site,
            f"images of {shapes.tolist()} patches do not fit {real.sum(-1).tolist()} tokens that are not padding",
        )
    columns = shapes[:, 1:].clamp(min=1)
    places = torch.stack([place // columns, place % columns], dim=-1).where(is_patch[..., None], -1)
    extents = shapes[:, None].where(is_patch[..., None], 0)
    places = torch.cat([places.new_full((batch, prefix, 2), -1), places], dim=1)
    extents = torch.cat([extents.new_zeros(batch, prefix, 2), extents], dim=1)
    return Grid(prefix, _shape_of_all(shapes), places, extents, places[..., 0].clamp(max=0))


def _prefix(patches: Patches, around: Surroundings) -> int:
    """The number of tokens before the patches, for a call on just the tokens that the patch embedding made."""
    called = (around.query.shape[0], around.query.shape[2])
    if patches.prefix is None or patches.tokens is None:
        raise unknown_grid(around.site, "which of its tokens are patches is not known")
    if called != patches.tokens or around.key.shape[2] != called[1]:
        raise unknown_grid(
            around.site,
            f"it attends over {called[1]} tokens in a batch of {called[0]}, where the patch embedding made "
            f"{patches.tokens[1]} in a batch of {patches.tokens[0]}, as in windows or on a smaller map",
        )
    return patches.prefix


def _given(patches: Patches, around: Surroundings) -> tuple[torch.Tensor, ...]:
    """What attention gets of the rotary embedding whose places are known."""
    arguments = (_tensors(value) for value in around.module_call().arguments.values())
    return next((tensors for tensors in arguments if _shapes(tensors) == _shapes(patches.turned)), ())


def _of_places(patches: Patches, told: torch.Tensor, given: tuple[torch.Tensor, ...], around: Surroundings) -> Grid:
    """Of a part of the row that all images of the batch are in, by the rotary embedding that attention gets."""
    if not given:
        raise unknown_grid(around.site, "its attention does not get the rotary embedding whose places are known")
    if torch.compiler.is_compiling():
        raise unknown_grid(
            around.site, "all images of the batch are in one row, of which compiled code cannot ask which is where"
        )
    if patches.packed is None or any(a is not b for a, b in zip(patches.packed[0], given, strict=True)):
        patches.packed = given, _sorted(told, patches.turned, given, around)
    packed = patches.packed[1]
    start, (batch, _, rows, _) = around.module_call().rows_done, around.query.shape
    part = slice(start, start + rows)
    if batch != 1 or start + rows > len(packed.images):
        raise unknown_grid(
            around.site,
            f"it attends over {rows} tokens in a batch of {batch}, where {len(packed.images)} are in one row",
        )
    images = packed.images[part]
    places, extents = packed.places[part][None], packed.extents[part][None]
    return Grid(0, _shape_of_all(extents[0]), places, extents, (images - images.min())[None])


def _sorted(
    told: torch.Tensor, turned: tuple[torch.Tensor, ...], given: tuple[torch.Tensor, ...], around: Surroundings
) -> Packed:
    """Check that the places make whole images, one after another, and put them in the order that tokens are in."""
    bounds = [*(told == 0).all(-1).nonzero().flatten().tolist(), len(told)]
    places = _rearranged(told, turned, given, around)
    images, extents = places.new_zeros(len(told)), torch.zeros_like(places)
    if bounds[0] != 0:
        raise unknown_grid(around.site, "its first token is not at the corner of an image")
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        part = places[start:stop]
        rows, columns = (part.amax(0) + 1).tolist()
        numbers = (part[:, 0] * columns + part[:, 1]).sort().values
        whole = torch.arange(rows * columns, device=part.device)
        if int(part.min()) < 0 or not torch.equal(numbers, whole):
            raise unknown_grid(
                around.site, f"its tokens {start} to {stop} do not make a whole image of {rows} x {columns} patches"
            )
        images[start:stop], extents[start:stop] = number, torch.tensor([rows, columns], device=part.device)
    return Packed(places, extents, images)


def _rearranged(
    places: torch.Tensor, turned: tuple[torch.Tensor, ...], given: tuple[torch.Tensor, ...], around: Surroundings
) -> torch.Tensor:
    """Places in the order of `given`, whose rows are those of `turned` in another order, such as by windows."""
    if all(torch.equal(a, b) for a, b in zip(turned, given, strict=True)):
        return places
    count = len(places)
    both = torch.cat([torch.cat([tensor.flatten(1).float() for tensor in tensors], -1) for tensors in (turned, given)])
    kinds = both.unique(dim=0, return_inverse=True)[1]
    of_kind = places.new_full((int(kinds.max()) + 1, 2), -1)
    of_kind[kinds[:count]] = places
    if not torch.equal(of_kind[kinds[:count]], places) or bool((of_kind[kinds[count:]] < 0).any()):
        raise unknown_grid(
            around.site, "its tokens are in another order than their places, and rotary embeddings do not tell in which"
        )
    return of_kind[kinds[count:]]


def _tensors(value: Any) -> tuple[torch.Tensor, ...]:
    values = value if isinstance(value, tuple | list) else (value,)
    return tuple(item for item in values if isinstance(item, torch.Tensor))


def _shapes(tensors: tuple[torch.Tensor, ...]) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors]


def _shape_of_all(shapes: torch.Tensor) -> tuple[int, int] | None:
    """The one shape among `(n, 2)` shapes."""
    rows, columns = shapes[0].tolist()
    return (rows, columns) if bool((shapes == shapes[0]).all()) else None
