"""Which positions of the input are image tokens, and how a vision-language model makes them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.selection import base_model


@dataclass(frozen=True)
class ImageLayout:
    """Where a vision-language model turns images into tokens: plain data, module names relative to the model.

    Attributes:
        image_token_id: id of the placeholder that image tokens take the place of.
        video_token_id: the same of videos, where the family has them.
        generator: module whose output holds the logits, `""` for the model itself.
        language_model: module that image tokens and text go through.
        tower: the vision encoder.
        feature_layer: index of the encoder layer whose output the image tokens are made of, counted from 0.
        features: module that gives the image tokens.
        skips_first: the encoder's first token is left out of the image tokens.
        has_class_token: the encoder's first token is a class token (CLS).
        grid: rows and columns of patches of one picture that goes through the encoder, where they are fixed.
        is_tiled: an image is a picture of the whole and several of its parts, and rows of patches end with a newline.
        merger: module that merges `merge**2` patches into one image token, in the encoder's own order.
        merge: how many rows (and columns) of patches make one row (and column) of image tokens.
        query_former: module that makes a fixed number of image tokens from any number of patches.
        query_tokens: that number.
    """

    image_token_id: int
    language_model: str
    tower: str
    features: str
    feature_layer: int
    has_class_token: bool
    generator: str = ""
    video_token_id: int | None = None
    skips_first: bool = False
    grid: tuple[int, int] | None = None
    is_tiled: bool = False
    merger: str | None = None
    merge: int = 1
    query_former: str | None = None
    query_tokens: int | None = None

    @property
    def placeholders(self) -> tuple[int, ...]:
        """Ids that image tokens take the place of."""
        return tuple(i for i in (self.image_token_id, self.video_token_id) if i is not None)


@dataclass(frozen=True)
class ImageSpan:
    """The tokens of one image.

    Attributes:
        row: which sequence of the batch.
        start, stop: its positions are `start` to `stop - 1`.
        grid: rows and columns of the tokens of the whole picture, `None` where tokens have no place in it (those of a
            Q-Former). They come first, row by row; an encoder's class token, where the model keeps it, before them.
        tiled_grid: rows and columns of the tokens of the enlarged picture that follow (LLaVA-NeXT), its padding and the
            newlines left out; `None` without one.
        newlines: positions of newline tokens.
    """

    row: int
    start: int
    stop: int
    grid: tuple[int, int] | None = None
    tiled_grid: tuple[int, int] | None = None
    newlines: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.stop - self.start


def image_layout(model: nn.Module) -> ImageLayout:
    """How a model turns images into tokens.

    Raises:
        NotImplementedError: no vision-language model, or one of a family that is not known.
        TypeError: `model` is not a transformers model.
    """
    base: Any = base_model(model)
    family = base.config.model_type
    if family not in _FAMILIES:
        raise NotImplementedError(
            f"{type(base).__name__} (model type {family!r}) is not a vision-language model whose image tokens "
            f"patchattn knows. Known model types: {', '.join(sorted(_FAMILIES))}."
        )
    return _FAMILIES[family](base)


def needed_layout(model: nn.Module, variant: str) -> ImageLayout:
    """`image_layout` of a model that a variant is to act on by its image tokens.

    Raises:
        NotImplementedError: as `image_layout`, in the name of the variant.
    """
    try:
        return image_layout(model)
    except NotImplementedError as error:
        name = type(base_model(model)).__name__
        raise NotImplementedError(
            f"The variant {variant!r} does not support without_images, which {name} needs: {error}"
        ) from error


def image_token_mask(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """`(B, T)` bool: which tokens are image tokens, newlines and query tokens included.

    Args:
        model: a LLaVA-1.5, LLaVA-NeXT, InstructBLIP or Qwen2.5-VL.
        input_ids: `(B, T)` as its processor makes them, one placeholder for every image token.

    Raises:
        ValueError: there is none, or `input_ids` has another shape.
        NotImplementedError: as `image_layout`.
    """
    layout = image_layout(model)
    if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2:
        raise ValueError(f"input_ids must be a tensor (B, T), got {getattr(input_ids, 'shape', input_ids)!r}.")
    mask = input_ids == layout.image_token_id
    if not bool(mask.any()):
        raise ValueError(
            f"There is no image in the input: none of its tokens is {layout.image_token_id}, the image token of "
            f"{type(base_model(model)).__name__}."
        )
    return mask


def is_replaced(embeddings: torch.Tensor, token_id: int, embedding: nn.Module) -> torch.Tensor:
    """`(B, T)` bool: which embeddings `(B, T, E)` are not those of that id. A placeholder's are replaced by an image's;
    one that the model wrote itself is text."""
    if token_id >= len(embedding.weight):  # type: ignore[arg-type]  # the model cannot write it
        return torch.ones(embeddings.shape[:-1], dtype=torch.bool, device=embeddings.device)
    own = embedding(torch.tensor([token_id], device=embeddings.device)).to(embeddings.device)
    return (embeddings != own).any(dim=-1)


def image_spans(
    model: nn.Module,
    input_ids: torch.Tensor,
    *,
    image_sizes: torch.Tensor | Sequence[Sequence[int]] | None = None,
    image_grid_thw: torch.Tensor | Sequence[Sequence[int]] | None = None,
) -> list[ImageSpan]:
    """Every image of a batch, row by row and from left to right.

    Args:
        model: as `image_token_mask`.
        input_ids: as `image_token_mask`.
        image_sizes: `(images, 2)` height and width in pixels, as LLaVA-NeXT's processor gives them.
        image_grid_thw: `(images, 3)` frames, rows and columns of patches, as Qwen2.5-VL's processor gives them.

    Raises:
        ValueError: no image, an argument that the family needs is missing, or numbers of tokens that do not fit.
        NotImplementedError: as `image_layout`.
    """
    base: Any = base_model(model)
    layout, mask = image_layout(base), image_token_mask(base, input_ids)
    if layout.is_tiled:
        shapes = [_tiled_shape(base.config, layout, size) for size in _needed(image_sizes, "image_sizes")]
    elif layout.merger is not None:
        shapes = [_merged_shape(layout, grid) for grid in _needed(image_grid_thw, "image_grid_thw")]
    else:
        length = layout.query_tokens or _picture(layout)
        shapes = [_Shape(length, layout.grid)] * (int(mask.sum()) // length)
    spans, row, column = [], 0, 0
    for shape in shapes:
        while row < len(mask) and not bool(mask[row, column:].any()):
            row, column = row + 1, 0
        if row == len(mask):
            break
        start = column + int(mask[row, column:].int().argmax())
        column = start + shape.length
        if column > mask.shape[1] or not bool(mask[row, start:column].all()):
            raise _misfit(mask, shapes)
        newlines = tuple(start + offset for offset in shape.newlines)
        spans.append(ImageSpan(row, start, column, shape.grid, shape.tiled_grid, newlines))
    if sum(map(len, spans)) != int(mask.sum()) or len(spans) != len(shapes):
        raise _misfit(mask, shapes)
    return spans


@dataclass(frozen=True)
class _Shape:
    """What is known of an image's tokens before they are looked for; newlines count from its first token."""

    length: int
    grid: tuple[int, int] | None = None
    tiled_grid: tuple[int, int] | None = None
    newlines: tuple[int, ...] = ()


def _needed(value: Any, name: str) -> list[list[int]]:
    if value is None:
        raise ValueError(f"This model's images differ in size: pass {name}=..., as its processor gives it.")
    return torch.as_tensor(value).tolist()


def _misfit(mask: torch.Tensor, shapes: Sequence[_Shape]) -> ValueError:
    return ValueError(
        f"The input has {mask.sum(-1).tolist()} image tokens per row, which do not fit images of "
        f"{[shape.length for shape in shapes]} tokens."
    )


def _picture(layout: ImageLayout) -> int:
    """Tokens of one picture of fixed size."""
    rows, columns = layout.grid or (0, 0)
    return rows * columns + (layout.has_class_token and not layout.skips_first)


def _merged_shape(layout: ImageLayout, grid: Sequence[int]) -> _Shape:
    frames, rows, columns = grid
    rows, columns = rows // layout.merge, columns // layout.merge
    return _Shape(frames * rows * columns, (frames * rows, columns))


def _tiled_shape(config: Any, layout: ImageLayout, size: Sequence[int]) -> _Shape:
    """LLaVA-NeXT: the whole picture, then that of the tiles, without its padding and with a newline after each row."""
    rows, columns = layout.grid or (0, 0)
    side, first = config.vision_config.image_size, _picture(layout)
    height, width = _best_resolution(size, config.image_grid_pinpoints)
    down, across = rows * (height // side), columns * (width // side)
    if size[1] / size[0] > across / down:  # wider than the tiles together: padded above and below
        margin = (down - int(round(size[0] * (across / size[1]), 7))) // 2
        down -= 2 * margin
    else:
        margin = (across - int(round(size[1] * (down / size[0]), 7))) // 2
        across -= 2 * margin
    ends = tuple(first + (row + 1) * (across + 1) - 1 for row in range(down))
    return _Shape(first + down * (across + 1), layout.grid, (down, across), ends)


def _best_resolution(size: Sequence[int], possible: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Of the resolutions that tiles can make, the one that keeps most of the picture, then wastes least."""

    def merit(resolution: Sequence[int]) -> tuple[int, int]:
        scale = min(resolution[1] / size[1], resolution[0] / size[0])
        pixels = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return pixels, pixels - resolution[0] * resolution[1]

    height, width = max(possible, key=merit)
    return height, width


def _layer(config: Any) -> int:
    """LLaVA's `vision_feature_layer` counts hidden states, of which the first is the embedding."""
    given, count = config.vision_feature_layer, config.vision_config.num_hidden_layers
    if not isinstance(given, int) or given == 0:
        raise NotImplementedError(
            f"Image tokens made of several layers of the vision encoder, or of its embeddings "
            f"(vision_feature_layer={given!r}), are not supported."
        )
    return count + given if given < 0 else given - 1


def _llava(model: Any) -> ImageLayout:
    config, inner = model.config, _inner(model, "vision_tower")
    side = config.vision_config.image_size // config.vision_config.patch_size
    tower = model.get_submodule(f"{inner}vision_tower")
    return ImageLayout(
        image_token_id=config.image_token_id,
        language_model=f"{inner}language_model",
        tower=f"{inner}vision_tower",
        features=f"{inner}multi_modal_projector",
        feature_layer=_layer(config),
        has_class_token=_has_class_token(tower),
        skips_first=config.vision_feature_select_strategy == "default",
        grid=(side, side),
        is_tiled=config.model_type == "llava_next",
    )


def _instructblip(model: Any) -> ImageLayout:
    config = model.config
    return ImageLayout(
        image_token_id=config.image_token_id,
        language_model="language_model",
        generator="language_model",
        tower="vision_model",
        features="language_projection",
        feature_layer=config.vision_config.num_hidden_layers - 1,
        has_class_token=_has_class_token(model.vision_model),
        query_former="qformer",
        query_tokens=config.num_query_tokens,
    )


def _qwen2_5_vl(model: Any) -> ImageLayout:
    config, inner = model.config, _inner(model, "visual")
    return ImageLayout(
        image_token_id=config.image_token_id,
        language_model=f"{inner}language_model",
        video_token_id=config.video_token_id,
        tower=f"{inner}visual",
        features=f"{inner}visual",
        feature_layer=config.vision_config.depth - 1,
        has_class_token=False,
        merger=f"{inner}visual.merger",
        merge=config.vision_config.spatial_merge_size,
    )


def _inner(model: nn.Module, child: str) -> str:
    """Prefix of the module that holds the towers: the model with a head holds it as `model`."""
    return "" if child in model._modules else "model."


def _has_class_token(tower: nn.Module) -> bool:
    return any(name.rpartition(".")[2] in ("class_embedding", "cls_token") for name, _ in tower.named_parameters())


_FAMILIES: dict[str, Callable[[Any], ImageLayout]] = {
    "llava": _llava,
    "llava_next": _llava,
    "instructblip": _instructblip,
    "qwen2_5_vl": _qwen2_5_vl,
}
