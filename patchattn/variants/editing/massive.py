"""Massive activations are taken out, or set to their mean, behind the layer that makes them. arXiv 2402.17762."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ...core.heads import parse_facts
from ...core.layer_outputs import LayerOutputVariant
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import VariantConfig, VariantInfo
from ...files.documents import quoted
from ...inspection.massive import MassiveActivations

Given = (
    str
    | Path
    | Mapping[int, Mapping[int, float]]
    | Mapping[str, Mapping[str, float]]
    | Mapping[str, Mapping[str, Mapping[str, float]] | Mapping[str, str | int | None] | float]
)


def _parse(given: Any) -> dict[str, Any]:
    """Values by layer and dimension, and where known the threshold and the model: what a saved patch holds."""
    if isinstance(given, str | Path):
        given = MassiveActivations.load(given)
    if isinstance(given, MassiveActivations):
        values = {each.layer: {one: found.mean for one, found in each.dimensions.items()} for each in given.layers}
        found = {layer: values[layer] for layer in values if values[layer]}
        if not found:
            raise ValueError(f"Nothing is massive among the activations of {given.base}.")
        return {"values": _by_layer(found), "threshold": given.threshold, "base": vars(given.base).copy()}
    if isinstance(given, Mapping) and "values" in given:
        if unknown := [key for key in given if key not in ("values", "threshold", "base")]:
            raise ValueError(f"Massive activations have the fields values, threshold and base, got {quoted(unknown)}.")
        more = {} if given.get("base") is None else {"base": vars(parse_facts(given["base"])).copy()}
        threshold = given.get("threshold", 0.0)
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not threshold >= 0:
            raise TypeError(f"The threshold of massive activations is a number from 0 on, got {quoted(threshold)}.")
        return {"values": _by_layer(given["values"]), "threshold": float(threshold), **more}
    return {"values": _by_layer(given), "threshold": 0.0}


def _by_layer(given: Any) -> dict[str, dict[str, float]]:
    if (
        not isinstance(given, Mapping)
        or not given
        or not all(isinstance(one, Mapping) and one for one in given.values())
    ):
        raise TypeError(
            f"Massive activations are a file, or a mapping of layers to dimensions to values, got {quoted(given)}."
        )
    found: dict[str, dict[str, float]] = {}
    for layer, dimensions in given.items():
        for dimension, value in dimensions.items():
            for number in (layer, dimension):
                if isinstance(number, bool) or not str(number).isdecimal():
                    raise TypeError(f"Layers and dimensions are counted from 0, got {quoted(number)}.")
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
                raise TypeError(
                    f"Dimension {dimension} of layer {layer} must have a finite number, got {quoted(value)}."
                )
            found.setdefault(str(int(layer)), {})[str(int(dimension))] = float(value)
    return found


@dataclass(frozen=True, kw_only=True)
class MassiveConfig(VariantConfig):
    """Settings of interventions on massive activations; every field is described by `patchattn info massive`."""

    activations: Given | None = option(
        None,
        parse=_parse,  # a saved patch holds them, not the name of a file
        help="Which dimensions of which layers' outputs: a file that `patchattn calibrate massive` wrote, or a mapping "
        "from layers to dimensions to mean values. It must be given.",
        source="paper: by model",
    )
    to: Literal["zero", "mean"] = option(
        "zero",
        help="What massive entries become: 0 (zero), or the mean value of their dimension (mean).",
        source="paper: both",
    )
    where: Literal["first", "all"] = option(
        "first",
        help="Behind which layers: the first of those with massive entries (first), whose work later layers pass on; "
        "or each of them (all).",
        source="paper: the layer in which they appear",
    )
    threshold: float | None = option(
        None,
        help="Entries of these dimensions that are larger than this are changed. None: that of the file; of a mapping "
        "every entry.",
        source="paper: 100",
        minimum=0.0,
    )
    strength: float = option(
        1.0, help="Share of the way there; 0 leaves them.", source="paper: all of it", minimum=0.0, maximum=1.0
    )


class Massive(LayerOutputVariant):
    """The residual stream behind a layer with entries of some dimensions set to zero or to their mean, where they are
    massive."""

    config_class = MassiveConfig
    config: MassiveConfig
    attends = False
    splits_by_head = True

    def __init__(self, config: MassiveConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        given: Any = config.activations or {"values": {}, "threshold": 0.0}
        self.values = {int(one): value for one, value in given["values"].get(str(site.layer_index), {}).items()}
        self.threshold = given["threshold"] if config.threshold is None else config.threshold

    @classmethod
    def fit(
        cls, config: MassiveConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[MassiveConfig, Sequence[AttentionSite]]:
        given: Any = config.activations
        if given is None:
            if config.strength == 0.0:
                return config, [site for site in sites if not site.is_cross]
            raise ValueError(
                "massive needs activations=FILE of `patchattn calibrate massive`, or a mapping from layers to "
                "dimensions to values."
            )
        named = sorted(map(int, given["values"]))
        chosen = [site for site in sites if not site.is_cross and site.layer_index in named]
        if not chosen:
            raise ValueError(
                f"Massive activations are known of the layers {named}, none of which is among those chosen."
            )
        for site in chosen:
            if "base" in given:
                parse_facts(given["base"]).check(model, site, "list of massive activations")
        first = min(site.layer_index for site in chosen)
        if config.where == "first":
            chosen = [site for site in chosen if site.layer_index == first]
        return config, chosen

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"strength": 0.0}

    @property
    def is_identity(self) -> bool:
        return self.config.strength == 0.0

    def changed(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self.values:  # of a patch without activations, which is neutral
            return hidden
        places = torch.tensor(sorted(self.values), device=hidden.device)
        if max(self.values) >= hidden.shape[-1]:
            raise ValueError(
                f"There is no dimension {max(self.values)} behind the layer of {self.site.name}, which hands on "
                f"{hidden.shape[-1]}."
            )
        old = hidden.index_select(-1, places)
        means = torch.tensor(
            [self.values[one] for one in sorted(self.values)], device=hidden.device, dtype=hidden.dtype
        )
        target = means if self.config.to == "mean" else torch.zeros_like(means)
        new = old + self.config.strength * (target - old) if self.config.strength != 1.0 else target.expand_as(old)
        return hidden.index_copy(-1, places, torch.where(old.abs() > self.threshold, new, old))


register_variant(
    VariantInfo(
        name="massive",
        variant=Massive,
        title="Massive Activations in Large Language Models",
        arxiv_id="2402.17762",
        year=2024,
        code="https://github.com/locuslab/massive-activations",
        summary="Massive entries of the residual stream are set to zero or to their mean.",
        extra_parameters="none",
        needs_training=False,
        examples=(
            {"activations": {1: {1: 0.5, 5: -0.25}}, "to": "mean", "threshold": 0.001},
            {"activations": {0: {2: 0.0}, 1: {0: 0.0, 3: 0.0}}, "where": "all"},
        ),
    )
)
