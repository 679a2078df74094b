"""Massive activations: entries of the residual stream that are far larger than all others. arXiv 2402.17762."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..core.call import AttentionCall
from ..core.heads import BaseFacts, parse_facts
from ..core.layer_outputs import enclosing_block, hidden_of
from ..core.probing import probed
from ..core.selection import base_model, select_sites
from ..files.documents import naming, quoted, read_json_object, write_json
from .channels import on_device

_LARGEST = 3


@dataclass(frozen=True)
class MassiveDimension:
    """A dimension of the residual stream in which a layer's output is massive.

    Attributes:
        count: how many entries are.
        mean: their mean, with its sign.
        tokens: number of a token in its sequence, the first that is not padding is 0, to how many are there.
        ids: id of the token to how many; empty where the model is not given ids.
    """

    count: int
    mean: float
    tokens: dict[int, int]
    ids: dict[int, int]


@dataclass(frozen=True)
class LayerActivations:
    """How large a layer's output is.

    Attributes:
        layer: its number, from 0.
        largest: the three largest sizes of entries, the largest first; each the mean over sequences.
        median: size of the median entry, of an even number the lower one; the mean over sequences.
        dimensions: where entries are massive.
    """

    layer: int
    largest: tuple[float, ...]
    median: float
    dimensions: dict[int, MassiveDimension]


@dataclass(frozen=True)
class MassiveActivations:
    """What a search for massive activations found.

    Attributes:
        layers: first layer first.
        threshold: an entry is massive if its size is above this ...
        ratio: ... and at least so many times the median of its sequence.
        sequences: how many.
        base: the model.
    """

    layers: tuple[LayerActivations, ...]
    threshold: float
    ratio: float
    sequences: int
    base: BaseFacts

    @property
    def first(self) -> int | None:
        """The first layer whose output is massive somewhere."""
        return next((each.layer for each in self.layers if each.dimensions), None)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of JSON types."""
        layers = {
            str(each.layer): {
                "largest": list(each.largest),
                "median": each.median,
                "dimensions": {str(one): vars(found).copy() for one, found in each.dimensions.items()},
            }
            for each in self.layers
        }
        facts = {"threshold": self.threshold, "ratio": self.ratio, "sequences": self.sequences}
        return {**facts, "base": vars(self.base).copy(), "layers": layers}

    def save(self, path: str | Path) -> None:
        """Write them as JSON, as `patch_model(model, "massive", activations=path)` reads them."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "MassiveActivations":
        """Read what `save` wrote; ValueError or TypeError, naming the file, on anything else."""
        content = read_json_object(path)
        try:
            return cls._parsed(content)
        except (TypeError, ValueError) as error:
            raise naming(path, error) from error

    @classmethod
    def _parsed(cls, content: Mapping[str, Any]) -> "MassiveActivations":
        _fields(content, "Massive activations", "threshold", "ratio", "sequences", "base", "layers")
        layers = []
        for layer, each in _mapping(content["layers"], "layers").items():
            _fields(each, f"Layer {layer}", "largest", "median", "dimensions")
            dimensions = {}
            for one, found in _mapping(each["dimensions"], "dimensions").items():
                _fields(found, f"Dimension {one}", "count", "mean", "tokens", "ids")
                tokens, ids = (
                    {_whole(key): _whole(value) for key, value in _mapping(found[name], name).items()}
                    for name in ("tokens", "ids")
                )
                dimensions[_whole(one)] = MassiveDimension(_whole(found["count"]), _number(found["mean"]), tokens, ids)
            largest = each["largest"]
            if not isinstance(largest, list):
                raise TypeError(f"The largest sizes of layer {layer} are a list, got {quoted(largest)}.")
            sizes = tuple(map(_number, largest))
            layers.append(LayerActivations(_whole(layer), sizes, _number(each["median"]), dimensions))
        numbers = (_number(content["threshold"]), _number(content["ratio"]), _whole(content["sequences"]))
        return cls(tuple(layers), *numbers, parse_facts(content["base"]))


@dataclass
class _Sums:
    """Of one layer so far."""

    largest: torch.Tensor = field(default_factory=lambda: torch.zeros(_LARGEST, dtype=torch.float64))
    median: float = 0.0
    sequences: int = 0
    values: dict[int, list[float]] = field(default_factory=dict)  # count and sum
    tokens: dict[int, Counter[int]] = field(default_factory=dict)
    ids: dict[int, Counter[int]] = field(default_factory=dict)


@torch.no_grad()
def massive_activations(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    threshold: float = 100.0,
    ratio: float = 1000.0,
    layers: int | Iterable[int] | None = None,
    modules: str | Iterable[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> MassiveActivations:
    """Where what layers hand on is massive: which dimensions, which tokens, how large; in one pass over data.

    Padding counts for nothing, and every sequence has a median of its own, however it is batched. What a layer hands on
    is looked at as it goes by, and not kept.

    Args:
        model: a transformers model in evaluation mode, patched or not.
        batches: keyword arguments of its forward; tensors are moved to its device.
        threshold: an entry is massive if its size is above this ...
        ratio: ... and at least so many times the median size of its sequence's entries in that layer.
        layers: which layers, as in `patch_model`.
        modules: which attention modules, by which layers are found, as in `patch_model`; those of one tower.
        progress: called with the number of batches done.

    Raises:
        ValueError: no data, a model in training mode, a threshold or ratio below 0, several towers, or a layer that the
            data does not reach.
        NotImplementedError: what a layer hands on is no row for each token that its attention sees.
    """
    base: Any = base_model(model)
    if base.training:
        raise ValueError("massive_activations needs a model in evaluation mode: model.eval().")
    if not (threshold >= 0 and ratio >= 0):
        raise ValueError(f"threshold and ratio are at least 0, got {threshold} and {ratio}.")
    sites = [site for site in select_sites(base, layers=layers, modules=modules) if not site.is_cross]
    if len({site.tower for site in sites}) != 1 or len({site.layer_index for site in sites}) < len(sites):
        raise ValueError(f"{type(base).__name__} has several towers, or attention modules in a layer: use modules=...")
    sums = {site.layer_index: _Sums() for site in sites}
    real: dict[int, torch.Tensor] = {}
    batch: dict[str, Any] = {}

    def see(call: AttentionCall, output: torch.Tensor) -> None:
        real[call.site.layer_index] = call.mask.real()

    def after(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden, rows = hidden_of(output), real.pop(layer, None)
            if rows is None or rows.shape[1] != hidden.shape[1] or len(rows) not in (1, len(hidden)):
                raise NotImplementedError(
                    f"{type(module).__name__} hands on {tuple(hidden.shape)}, whose rows are not those that its "
                    "attention sees: leave it out with modules=..."
                )
            ids = batch.get("input_ids")
            known = isinstance(ids, torch.Tensor) and ids.shape == hidden.shape[:2]
            for row, which in enumerate(rows.expand(len(hidden), -1)):
                kept = ids[row][which.to(ids.device)].tolist() if known and ids is not None else None
                _add(sums[layer], hidden[row][which.to(hidden.device)], kept, threshold, ratio)

        return hook

    handles: list[RemovableHandle] = []
    try:
        for site in sites:
            block = base.get_submodule(enclosing_block(base, site.name))
            handles.append(block.register_forward_hook(after(site.layer_index)))
        with probed(base, see, modules=[f"^{site.name}$" for site in sites]):
            for done, given in enumerate(batches, 1):
                batch = on_device(base, given)
                base(**batch)
                if progress is not None:
                    progress(done)
    finally:
        for handle in handles:
            handle.remove()
    if missing := [site.name for site in sites if not sums[site.layer_index].sequences]:
        raise ValueError(f"The data does not reach {missing[0]}: give batches, or leave it out with modules=...")
    found = tuple(_of_layer(layer, sums[layer]) for layer in sorted(sums))
    sequences = max(each.sequences for each in sums.values())
    return MassiveActivations(found, float(threshold), float(ratio), sequences, BaseFacts.of(base, sites[0]))


def _add(sums: _Sums, hidden: torch.Tensor, ids: list[int] | None, threshold: float, ratio: float) -> None:
    """Count one sequence `(n, E)`, without padding."""
    if not len(hidden):
        return
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    sizes = hidden.abs()
    top = sizes.flatten().topk(min(_LARGEST, sizes.numel())).values.cpu().double()
    median = sizes.median()
    sums.largest[: len(top)] += top
    sums.median += float(median)
    sums.sequences += 1
    places = ((sizes > threshold) & (sizes >= ratio * median)).nonzero().tolist()
    for token, dimension in places:
        value = sums.values.setdefault(dimension, [0, 0.0])
        value[0] += 1
        value[1] += float(hidden[token, dimension])
        sums.tokens.setdefault(dimension, Counter())[token] += 1
        if ids is not None:
            sums.ids.setdefault(dimension, Counter())[ids[token]] += 1


def _of_layer(layer: int, sums: _Sums) -> LayerActivations:
    dimensions = {
        one: MassiveDimension(
            int(count),
            total / count,
            dict(sorted(sums.tokens[one].items())),
            dict(sorted(sums.ids.get(one, Counter()).items())),
        )
        for one, (count, total) in sorted(sums.values.items())
    }
    largest = tuple((sums.largest / sums.sequences).tolist())
    return LayerActivations(layer, largest, sums.median / sums.sequences, dimensions)


def _fields(given: Any, what: str, *names: str) -> None:
    if not isinstance(given, Mapping) or set(given) != set(names):
        raise ValueError(f"{what} must have the fields {', '.join(names)}, got {quoted(given)}.")


def _mapping(given: Any, what: str) -> Mapping[Any, Any]:
    if not isinstance(given, Mapping):
        raise TypeError(f"{what} must be a mapping, got {quoted(given)}.")
    return given


def _whole(given: Any) -> int:
    number = int(given) if isinstance(given, str) and given.isdecimal() else given
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise TypeError(f"Layers, dimensions, tokens and counts are whole numbers from 0 on, got {quoted(given)}.")
    return number


def _number(given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
        raise TypeError(f"Expected a finite number, got {quoted(given)}.")
    return float(given)
