"""How the kernels of `split_attention` and `column_mass` are launched. Imports triton."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .backend import on_device
from .key_mask import KeyMask, strides_but_of_one
from .split_attention_tiles_triton import LOG2_E
from .tuning import Launch, bucket, run_chosen, tile_width


def mask_arguments(mask: KeyMask, other: torch.Tensor) -> dict[str, Any]:
    """What kernels take of a key mask; `other` stands for tensors that are not there."""
    strides: tuple[int, ...] = (0, 0, 0)
    bounds: tuple[int, ...] = (0, 0)
    some = {"mask": other, "first": other, "last": other}
    if mask.mask is not None and mask.first is not None and mask.last is not None:
        strides, bounds = strides_but_of_one(mask.mask), strides_but_of_one(mask.first)
        some = {"mask": mask.mask.view(torch.uint8), "first": mask.first, "last": mask.last}
    return {
        **some,
        **dict(zip(("mask_batch", "mask_row", "mask_column"), strides, strict=True)),
        **dict(zip(("bound_batch", "bound_row"), bounds, strict=True)),
        "offset": mask.offset,
        "window": mask.window,
        "CAUSAL": mask.causal,
        "WINDOWED": mask.window > 0,
        "MASKED": mask.mask is not None,
        "PER_ROW": mask.mask is not None and mask.mask.shape[1] > 1,
    }


def strides_of(**tensors: torch.Tensor) -> dict[str, int]:
    """Strides of `(B, H, T, D)` tensors but the last, by the names that kernels have for them."""
    kinds = ("batch", "head", "token")
    return {f"{name}_{kind}": tensor.stride(i) for name, tensor in tensors.items() for i, kind in enumerate(kinds)}


def sizes_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> dict[str, Any]:
    """Sizes that all of these kernels take."""
    return {
        "heads": query.shape[1],
        "group": query.shape[1] // key.shape[1],
        "queries": query.shape[2],
        "keys": key.shape[2],
        "scale": scaling * LOG2_E.value,
        "DIM": query.shape[3],
        "DIM_V": value.shape[3],
        "BLOCK_D": tile_width(query.shape[3]),
        "BLOCK_V": tile_width(value.shape[3]),
    }


def launch(
    kernel: Any,
    name: str,
    programs: Callable[[Launch], int],
    arguments: dict[str, Any],
    candidates: Sequence[Launch],
    device: torch.device,
) -> None:
    """Run a kernel with the launch settings known for its shape.

    Args:
        kernel: which.
        name: how its settings are called.
        programs: their number.
        arguments: by name; sizes as `sizes_of` gives them.
        candidates: launch settings, the default first.
        device: of the tensors.
    """

    def run(settings: Launch) -> Any:
        return kernel[(programs(settings),)](**arguments, **settings.arguments())

    sizes = ("queries", "keys")
    same = ("group", "DIM", "DIM_V", "CAUSAL", "WINDOWED", "MASKED", "PER_ROW", "LISTED", "PADDED")
    shape: dict[str, Any] = {size: bucket(arguments[size]) for size in sizes}
    shape |= {name: arguments[name] for name in same if name in arguments}
    shape["dtype"] = arguments["query"].dtype
    with on_device(arguments["query"]):
        run_chosen(name, shape, candidates, device, run)


def list_arguments(index: torch.Tensor, rank: torch.Tensor, batch: int, heads: int) -> dict[str, Any]:
    """What kernels take of a compact list of keys, which several heads may share."""
    index, rank = (tensor.expand(batch, heads, -1) for tensor in (index, rank))
    return {"index": index, "rank": rank, "list_batch": index.stride(0), "list_head": index.stride(1)}
