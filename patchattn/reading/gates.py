"""Gates of kv heads: how much each needs keys from far away, as a calibration finds and saves them."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..core.heads import BaseFacts, parse_facts
from ..core.importance import HeadImportance, SiteScores
from ..core.sites import AttentionSite
from ..files.documents import naming, quoted, read_json, read_text

# As settings take them: a file, or per layer a gate for each kv head, or what `HeadGates.to_dict` gives.
Gates = (
    str | Path | Mapping[str, Sequence[Sequence[float]] | Mapping[str, str | int | None]] | Sequence[Sequence[float]]
)
_FIELDS = ("gates", "base", "calibration")


@dataclass(frozen=True)
class HeadGates:
    """A gate for every kv head of a model: 1 needs all keys, 0 only the first and the last ones.

    Attributes:
        gates: by layer, then by kv head.
        base: the model they are for, where that is known.
    """

    gates: tuple[tuple[float, ...], ...]
    base: BaseFacts | None = None

    @classmethod
    def parse(cls, given: Any) -> "HeadGates":
        """Read gates: a JSON file of `patchattn calibrate duo`, a TSV file of released ones, or numbers by layer.

        Raises:
            ValueError: the file is missing or not valid, a field is unknown, a layer has no gate, or one is not from 0
                to 1.
            TypeError: something else than numbers by layer.
        """
        if isinstance(given, str | Path):
            return cls._read(Path(given))
        if isinstance(given, Mapping):
            if "gates" not in given or (unknown := [key for key in given if key not in _FIELDS]):
                wrong = list(given) if "gates" not in given else unknown
                raise ValueError(f"Gates have the fields {', '.join(_FIELDS)}, got {quoted(wrong)}.")
            base = given.get("base")
            return cls(_by_layer(given["gates"]), None if base is None else parse_facts(base))
        return cls(_by_layer(given))

    @classmethod
    def _read(cls, path: Path) -> "HeadGates":
        if not os.path.isfile(path):
            raise ValueError(f"There is no file of gates {quoted(str(path))}.")
        try:
            if path.suffix == ".tsv":
                lines = [line.split("\t") for line in read_text(path).splitlines() if line.strip()]
                return cls.parse([[_number(cell) for cell in line] for line in lines])
            return cls.parse(read_json(path))
        except (TypeError, ValueError) as error:
            raise naming(path, error) from error

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of JSON types, which `parse` takes."""
        gates = {"gates": [list(layer) for layer in self.gates]}
        return gates if self.base is None else {**gates, "base": vars(self.base).copy()}

    def as_importance(self) -> HeadImportance:
        """The gates as scores of kv heads, to be drawn; ValueError where it is not known of which model they are."""
        if self.base is None:
            raise ValueError("It is not known of which model these gates are.")
        sites = {f"layer {layer}": SiteScores(layer, len(gates), gates) for layer, gates in enumerate(self.gates)}
        return HeadImportance(sites, "duo", self.base)

    def check(self, model: nn.Module, sites: Sequence[AttentionSite]) -> None:
        """ValueError if they are for another model, or of other numbers of layers or kv heads."""
        for site in sites:
            if self.base is not None:
                self.base.check(model, site, "file of gates")
            layers, heads = len(self.gates), site.require("kv_heads", by="gates")
            if layers != site.layer_count or len(self.gates[site.layer_index]) != heads:
                raise ValueError(
                    f"Gates are given for {layers} layers, {len(self.gates[min(site.layer_index, layers - 1)])} in the "
                    f"one of {site.name}, which is one of {site.layer_count} with {heads} kv heads."
                )

    def lowest(self, share: float) -> list[tuple[int, ...]]:
        """The kv heads with the lowest gates, by layer: below the quantile of all gates, linearly interpolated.

        Args:
            share: 0: none; 1: all. Of equal gates, those in lower layers come first, in a layer the first ones.
        """
        places = [(gate, layer, head) for layer, row in enumerate(self.gates) for head, gate in enumerate(row)]
        count = len(places) if share == 1.0 else math.ceil(share * (len(places) - 1) - _ROUNDING)
        chosen = {place[1:] for place in sorted(places)[:count]}
        return [
            tuple(head for head in range(len(row)) if (layer, head) in chosen) for layer, row in enumerate(self.gates)
        ]


_ROUNDING = 1e-9  # 0.1 * 30 is more than 3 in floating point


def _by_layer(given: Any) -> tuple[tuple[float, ...], ...]:
    if not isinstance(given, Sequence) or isinstance(given, str) or any(not _is_row(row) for row in given):
        raise TypeError(f"Gates are a file, or per layer a number for each kv head, got {quoted(given)}.")
    if not given or not all(given):
        raise ValueError(f"Every layer must have a gate for each kv head, got {quoted(given)}.")
    wrong = [gate for row in given for gate in row if not 0.0 <= gate <= 1.0]
    if wrong:
        raise ValueError(f"A gate is a number from 0 to 1, got {wrong[0]}.")
    return tuple(tuple(float(gate) for gate in row) for row in given)


def _is_row(row: Any) -> bool:
    is_list = isinstance(row, Sequence) and not isinstance(row, str)
    return is_list and all(isinstance(gate, int | float) and not isinstance(gate, bool) for gate in row)


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError as error:
        raise ValueError(f"A gate is a number from 0 to 1, got {quoted(cell)}.") from error
