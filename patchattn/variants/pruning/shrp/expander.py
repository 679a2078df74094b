"""What SHRP's settings mean on a model: which heads, which layers, and the weights that its expander starts from."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ....core.host import find_sites
from ....core.importance import HeadImportance
from ....core.linear import LinearView
from ....core.settings import nearest
from ....core.sites import AttentionSite
from ....files.documents import concerning, quoted
from ....surgery.projections import layer_path
from .expert_layer import HostLayer


def parse_kept(given: Any) -> tuple[int, ...] | dict[str, list[int]]:
    """Heads to keep, sorted: of every layer, or by layer or attention module."""
    if isinstance(given, Mapping):
        return {str(key): _sorted(heads) for key, heads in given.items()}
    return tuple(_sorted(given))


def _sorted(heads: Any) -> list[int]:
    if not isinstance(heads, list | tuple) or not all(type(head) is int for head in heads):
        raise TypeError(f"Heads to keep are a list of integers, got {quoted(heads)}.")
    return sorted(heads)


def check_kept(kept: Sequence[int] | Mapping[str, Sequence[int]], count: int) -> None:
    """ValueError unless `count` different heads are kept everywhere."""
    for heads in kept.values() if isinstance(kept, Mapping) else [kept]:
        if len(heads) != count or len(set(heads)) != count or min(heads, default=0) < 0:
            raise ValueError(
                f"Expected {count} different heads, counted from 0, as heads={count} says; got {list(heads)}."
            )


def heads_by_module(given: Any, sites: Sequence[AttentionSite]) -> dict[str, list[int]]:
    """Heads by the name of the attention module, from a list for all or a mapping from layers or modules.

    Raises:
        ValueError: a layer or module is unknown, or has no heads.
    """
    if not isinstance(given, Mapping):
        return {site.name: list(given) for site in sites}
    known = {key for site in sites for key in (site.name, str(site.layer_index))}
    for key in given:
        if key not in known:
            raise ValueError(f"Heads are given for {key!r}, which is not converted{nearest(key, sorted(known))}")
    chosen = {site.name: given.get(site.name, given.get(str(site.layer_index))) for site in sites}
    for name, heads in chosen.items():
        if heads is None:
            raise ValueError(
                f"No heads are given for {name}: name those of every converted layer, or choose layers=..."
            )
    return {name: list(heads) for name, heads in chosen.items()}


def head_weights(given: Any, model: nn.Module, sites: Sequence[AttentionSite]) -> dict[str, list[float]] | None:
    """A weight per head by the name of the attention module, from a file or a mapping.

    Raises:
        ValueError: no such file, it was made for another model, or weights that are not a distribution over the heads.
    """
    if given is None:
        return None
    if isinstance(given, str | Path):
        if not os.path.isfile(given):
            raise ValueError(f"There is no file {quoted(str(given))} with the importance of heads.")
        importance = HeadImportance.load(given)
        with concerning(given):
            importance.check(model)
        given = importance.scores
    for site in sites:
        check_weights(given, site)
    return {site.name: [float(weight) for weight in given[site.name]] for site in sites}


def check_weights(given: Any, site: AttentionSite) -> None:
    """Raise TypeError or ValueError if the weights of a module's heads are not a distribution over them."""
    if not isinstance(given, Mapping):
        raise TypeError(
            f"importance must be a file or a mapping from attention modules to weights, got {quoted(given)}."
        )
    weights: Any = given.get(site.name)
    is_list = isinstance(weights, list) and all(type(weight) in (int, float) for weight in weights)
    if not is_list or len(weights) != site.query_heads or min(weights) < 0 or not 0 < sum(weights) < 1e30:
        raise ValueError(
            f"importance must give {site.name} {site.query_heads} numbers of at least 0, not all 0, with a sum below "
            f"1e30; got {quoted(weights)}."
        )


def dropped_layers(given: Any, model: nn.Module, sites: Sequence[AttentionSite]) -> dict[str, list[str]]:
    """Paths of layers to take out, by the converted attention module that carries the change: the tower's first.

    Raises:
        TypeError: something else than layer indices.
        ValueError: there is no such layer, or it is to be converted.
    """
    if not isinstance(given, tuple) or not all(type(index) is int for index in given):
        raise TypeError(f"layers_dropped must be a list of layer indices, got {quoted(given)}.")
    dropped: dict[str, list[str]] = {}
    everywhere = find_sites(model)
    for index in given:
        if converted := [site.name for site in sites if site.layer_index == index]:
            raise ValueError(
                f"Layer {index} is to be dropped and converted ({converted[0]}): choose others by layers=..."
            )
        found = [site for site in everywhere if site.layer_index == index]
        for site in found:
            first = next((other.name for other in sites if other.tower == site.tower), None)
            if first is not None and layer_path(site) not in dropped.setdefault(first, []):
                dropped[first].append(layer_path(site))
        if not any(site.tower == other.tower for site in found for other in sites):
            raise ValueError(f"There is no layer {index} to drop; layers are counted from 0.")
    return dropped


def initial_expander(
    model: nn.Module, host: HostLayer, site: AttentionSite, size: int, weights: Sequence[float] | None
) -> dict[str, torch.Tensor]:
    """The expander that a pretrained layer starts from.

    With W_O^h the columns of the output projection that read head h, and w their weights, which sum to 1:
    `W_1 = W_in sum_h w_h W_O^h`, `b_1 = W_in b_O + b_in`, `W_2 = W_out`, `b_2 = b_out`.

    Args:
        model: that the layer is of.
        host: the layer as it was.
        site: its attention.
        size: channels of the expander; fewer than the layer has are those with the largest product of the norms of
            their weights.
        weights: per head, of any positive sum; equal without.

    Returns:
        Values of SHRP's parameters by name.
    """
    views = [LinearView.at(model, path) for path in (host.output, host.maker, host.reader)]
    output, maker, reader = ((view.weight, view.bias) for view in views)
    heads = site.query_heads or 1
    share = torch.as_tensor(
        [1.0] * heads if weights is None else weights, dtype=output[0].dtype, device=output[0].device
    )
    by_head = output[0].unflatten(1, (heads, -1))  # (E, H, D)
    mean = torch.einsum("ehd,h->ed", by_head, share / share.sum())
    values = {
        "expander_in_weight": maker[0] @ mean,
        "expander_in_bias": maker[0] @ output[1] + maker[1],
        "expander_out_weight": reader[0],
        "expander_out_bias": reader[1],
    }
    if size < len(maker[1]):
        strength = maker[0].norm(dim=1) * reader[0].norm(dim=0)
        channels = strength.topk(size).indices.sort().values
        for name, dim in (("expander_in_weight", 0), ("expander_in_bias", 0), ("expander_out_weight", 1)):
            values[name] = values[name].index_select(dim, channels)
    return values
