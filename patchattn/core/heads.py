"""Lists of query heads, as a calibration finds and saves them: plain JSON, and for which model they are."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..files.documents import naming, quoted, read_json
from .sites import AttentionSite

# Query heads as settings take them: a file, heads by layer or by attention module, pairs of (layer, head), or what
# `HeadList.to_dict` gives.
Heads = (
    str
    | Path
    | Mapping[int, Sequence[int]]
    | Mapping[str, Sequence[int]]
    | Mapping[str, Mapping[str, Sequence[int]] | Mapping[str, str | int | None]]
    | Sequence[Sequence[int]]
)


@dataclass(frozen=True)
class BaseFacts:
    """The model that a list of heads belongs to.

    Attributes:
        model_type: as transformers names it, of the language model where there are several towers.
        layers, heads: attention layers, and query heads of each, of the tower.
        name: the last part of the folder or Hub id it was loaded from; `None` for one made from a configuration.
    """

    model_type: str
    layers: int
    heads: int
    name: str | None = None

    @classmethod
    def of(cls, model: nn.Module, site: AttentionSite) -> "BaseFacts":
        """Those of a transformers model and the tower of one of its attention modules."""
        config: Any = model.config
        name = Path(str(getattr(config, "name_or_path", "") or "")).name
        return cls(config.get_text_config().model_type, site.layer_count, site.heads_in_all[0] or 0, name or None)

    def check(self, model: nn.Module, site: AttentionSite, what: str) -> None:
        """ValueError if an attention module belongs to another model than what these facts were written for."""
        found = BaseFacts.of(model, site)
        same_name = self.name is None or found.name is None or self.name == found.name
        if not same_name or (self.model_type, self.layers, self.heads) != (found.model_type, found.layers, found.heads):
            raise ValueError(
                f"This {what} is for {self}, but {site.name} belongs to {found}. Calibrate this model, choose the "
                "right tower with modules=..., or, if it is the same model under another name, set base.name to null "
                "there."
            )

    def __str__(self) -> str:
        name = f"{self.name}, " if self.name else ""
        return f"{name}{self.model_type} of {self.layers} layers with {self.heads} heads"


@dataclass(frozen=True)
class HeadList:
    """Query heads by layer.

    Attributes:
        heads: layer to heads, both counted from 0 and sorted.
        base: the model they are for, where the list says so.
    """

    heads: dict[int, tuple[int, ...]]
    base: BaseFacts | None = None

    @classmethod
    def parse(cls, given: Any) -> "HeadList":
        """Read a list: the path of a JSON file, a mapping from layers to heads, or pairs of (layer, head).

        Raises:
            ValueError: the file is missing or not valid JSON, a field is unknown, there is no head at all, a number is
                negative, or a head is named twice.
            TypeError: something else than layers and heads.
        """
        if isinstance(given, str | Path):
            return cls._read(Path(given))
        if isinstance(given, Mapping) and "heads" in given:
            if unknown := [key for key in given if key not in ("heads", "base", "calibration")]:
                raise ValueError(f"A head list has the fields heads, base and calibration, got {quoted(unknown)}.")
            base = given.get("base")
            return cls(_by_layer(given["heads"]), None if base is None else parse_facts(base))
        return cls(_by_layer(given))

    @classmethod
    def _read(cls, path: Path) -> "HeadList":
        if not os.path.isfile(path):
            raise ValueError(f"There is no head list {quoted(str(path))}.")
        content = read_json(path)
        try:
            return cls.parse(content if isinstance(content, Mapping) else {"heads": content})
        except (TypeError, ValueError) as error:
            raise naming(path, error) from error

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of JSON types, which `parse` takes."""
        heads = {str(layer): list(heads) for layer, heads in self.heads.items()}
        return {"heads": heads} if self.base is None else {"heads": heads, "base": vars(self.base).copy()}

    def check(self, model: nn.Module, sites: Sequence[AttentionSite]) -> None:
        """ValueError if the list is for another model, or names no head of these attention modules."""
        for site in sites:
            if self.base is not None:
                self.base.check(model, site, "head list")
        chosen = [self.of_site(site) for site in sites]
        if not any(chosen):
            raise ValueError(
                f"The head list has heads in the layers {sorted(self.heads)}, none of which is among those chosen."
            )

    def of_site(self, site: AttentionSite) -> tuple[int, ...]:
        """The heads of one attention module, of a part of it those that are there, by their numbers there.

        ValueError if the list names layers or heads that are not there.
        """
        count = site.heads_in_all[0] or 0
        for layer, heads in self.heads.items():
            if layer >= site.layer_count or heads[-1] >= count:
                raise ValueError(
                    f"The head list names head {heads[-1]} of layer {layer}, but {site.tower or 'the model'} has "
                    f"{site.layer_count} layers of {count} heads, counted from 0."
                )
        return site.own_heads(self.heads.get(site.layer_index, ()))


def plain_heads(given: Any) -> dict[str, Any]:
    """A head list as settings hold it: the list itself, so that a saved patch does not need the file it came from.

    Takes and raises what `HeadList.parse` does.
    """
    return HeadList.parse(given).to_dict()


def _by_layer(given: Any) -> dict[int, tuple[int, ...]]:
    """Layers to heads from a mapping or from pairs."""
    pairs: list[tuple[Any, Any]] = []
    if isinstance(given, Mapping):
        for layer, heads in given.items():
            if not isinstance(heads, Sequence) or isinstance(heads, str):
                raise TypeError(f"Layer {layer} must have a list of heads, got {quoted(heads)}.")
            pairs += [(layer, head) for head in heads]
    elif isinstance(given, Sequence) and not isinstance(given, str):
        for pair in given:
            if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
                raise TypeError(f"A head is a pair (layer, head), got {quoted(pair)}.")
            pairs.append((pair[0], pair[1]))
    else:
        raise TypeError(
            f"Heads are a file, a mapping from layers to heads or pairs of (layer, head), got {quoted(given)}."
        )
    if not pairs:
        raise ValueError("The head list is empty: name at least one head, or leave it out for the default ones.")
    found: dict[int, set[int]] = {}
    for layer, head in pairs:
        heads = found.setdefault(_index(layer), set())
        if _index(head) in heads:
            raise ValueError(f"Head {head} of layer {layer} is named twice.")
        heads.add(_index(head))
    return {layer: tuple(sorted(found[layer])) for layer in sorted(found)}


def _index(value: Any) -> int:
    if isinstance(value, str) and value.isdecimal():  # the keys of a JSON object are strings
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"Layers and heads are integers, got {quoted(value)}.")
    if value < 0:
        raise ValueError(f"Layers and heads are counted from 0, got {quoted(value)}.")
    return value


def parse_facts(given: Any) -> BaseFacts:
    """A model's facts from the JSON that a calibration wrote; ValueError or TypeError on anything else."""
    kinds = {"model_type": str, "layers": int, "heads": int, "name": str | None}
    if not isinstance(given, Mapping) or not {"model_type", "layers", "heads"} <= set(given) <= set(kinds):
        raise ValueError(f"A head list's base has model_type, layers, heads and name, got {quoted(given)}.")
    if wrong := [key for key, value in given.items() if not isinstance(value, kinds[key])]:
        raise TypeError(f"A head list's base has {wrong[0]}={quoted(given[wrong[0]])}.")
    return BaseFacts(**given)
