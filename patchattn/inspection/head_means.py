"""`head_means`: what every query head gives on average, over data in one pass."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn

from ..core.call import AttentionCall
from ..core.head_vectors import HeadVectors
from ..core.heads import BaseFacts
from ..core.probing import probed
from ..core.selection import base_model, select_sites
from .channels import on_device

Rows = Literal["all", "last"]


@torch.no_grad()
def head_means(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    rows: Rows = "all",
    layers: int | Iterable[int] | None = None,
    modules: str | Iterable[str] | None = None,
) -> HeadVectors:
    """Mean output of every query head, before the output projection; padding is in no mean.

    `patch_model(model, "heads", vectors=head_means(model, batches).to_dict())` is mean ablation. With `rows="last"`
    they are what function vectors (arXiv 2310.15213) are made of.

    Args:
        model: a transformers model in evaluation mode, patched or not.
        batches: keyword arguments of its forward; tensors are moved to its device.
        rows: mean over all tokens, or over the last token of every sequence (`last`).
        layers: which layers, as in `patch_model`.
        modules: which attention modules, as in `patch_model`; one tower, and not its cross attention.

    Returns:
        A float64 mean `(D,)` of every query head, and the model's name.

    Raises:
        ValueError: no data, a model in training mode, an unknown `rows`, several attention modules of one layer, or one
            that the data does not reach.
    """
    if rows not in get_args(Rows):
        raise ValueError(f"rows must be one of {get_args(Rows)}, got {rows!r}.")
    base = base_model(model)
    if base.training:
        raise ValueError("head_means needs a model in evaluation mode: model.eval().")
    sites = select_sites(base, layers=layers, modules=modules)
    by_layer = {site.layer_index: site for site in sites}
    if len(by_layer) < len(sites) or len({site.tower for site in sites}) > 1:
        raise ValueError(
            f"{type(base).__name__} has several attention modules in a layer, or several towers: choose one of each "
            "with modules=..., for which vectors are kept by layer."
        )
    sums: dict[int, torch.Tensor] = {}
    counts: dict[int, int] = {}

    def see(call: AttentionCall, output: torch.Tensor) -> None:
        real = call.mask.real().expand(output.shape[:2])
        if rows == "last":
            places = torch.arange(real.shape[1], device=real.device)
            last = torch.where(real, places, -1).amax(dim=-1, keepdim=True)
            real = real & (places == last)
        layer, found = call.site.layer_index, output[real].cpu().double()  # Apple's GPUs have no double
        sums[layer] = sums.get(layer, 0.0) + found.sum(0)
        counts[layer] = counts.get(layer, 0) + len(found)

    with probed(base, see, layers=layers, modules=modules):
        for batch in batches:
            base(**on_device(base, batch))
    if missing := [site.name for site in sites if not counts.get(site.layer_index)]:
        raise ValueError(f"The data does not reach {missing[0]}: give batches, or leave it out with modules=...")
    means = {layer: (sums[layer] / counts[layer]).tolist() for layer in sorted(sums)}
    vectors = {layer: {head: tuple(mean) for head, mean in enumerate(means[layer])} for layer in means}
    return HeadVectors(vectors, BaseFacts.of(base, sites[0]))
