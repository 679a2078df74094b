"""A vector for each of some query heads, as a calibration finds and saves them: plain JSON, and for which model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.documents import naming, quoted, read_json_object, write_json
from .heads import BaseFacts, HeadList, parse_facts
from .sites import AttentionSite

# As settings take them: a file, vectors by layer and head, or what `HeadVectors.to_dict` gives.
Vectors = (
    str
    | Path
    | Mapping[int, Mapping[int, Sequence[float]]]
    | Mapping[str, Mapping[str, Sequence[float]]]
    | Mapping[str, Mapping[str, Mapping[str, Sequence[float]]] | Mapping[str, str | int | None]]
)


@dataclass(frozen=True)
class HeadVectors:
    """Vectors by layer and query head.

    Attributes:
        vectors: layer to head to `(D,)` numbers, D the dimension of the head's output; all counted from 0.
        base: the model they are of, where it is known.
    """

    vectors: dict[int, dict[int, tuple[float, ...]]]
    base: BaseFacts | None = None

    @property
    def heads(self) -> HeadList:
        """The heads that have one."""
        return HeadList({layer: tuple(of_layer) for layer, of_layer in self.vectors.items()}, self.base)

    def of_site(self, site: AttentionSite) -> dict[int, tuple[float, ...]]:
        """The vectors of one attention module by head; see `HeadList.of_site` for the numbers of a part of it."""
        given = self.vectors.get(site.layer_index, {})
        return {own: given[head] for head in given for own in site.own_heads([head])}

    @classmethod
    def parse(cls, given: Any) -> "HeadVectors":
        """Read vectors: the path of a JSON file, or a mapping from layers to heads to numbers.

        Raises:
            ValueError: the file is missing or not valid JSON, a field is unknown, there is no vector at all, or
                lengths differ.
            TypeError: something else than layers, heads and numbers.
        """
        if isinstance(given, str | Path):
            content = read_json_object(given)
            try:
                return cls.parse(content)
            except (TypeError, ValueError) as error:
                raise naming(given, error) from error
        if not isinstance(given, Mapping):
            raise TypeError(f"Vectors are a file or a mapping from layers to heads to numbers, got {quoted(given)}.")
        base = None
        if "vectors" in given:
            if unknown := [key for key in given if key not in ("vectors", "base", "about")]:
                raise ValueError(f"Vectors of heads have the fields vectors, base and about, got {quoted(unknown)}.")
            base = None if given.get("base") is None else parse_facts(given["base"])
            given = given["vectors"]
        return cls(_by_head(given), base)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of JSON types, which `parse` takes."""
        vectors = {
            str(layer): {str(head): list(vector) for head, vector in of_layer.items()}
            for layer, of_layer in self.vectors.items()
        }
        return {"vectors": vectors} if self.base is None else {"vectors": vectors, "base": vars(self.base).copy()}

    def save(self, path: str | Path, **about: Any) -> None:
        """Write them as `patch_model(model, "heads", vectors=path)` reads them; `about` is noted beside them."""
        write_json(Path(path), {**self.to_dict(), "about": about})


def _by_head(given: Any) -> dict[int, dict[int, tuple[float, ...]]]:
    if not isinstance(given, Mapping) or not all(isinstance(heads, Mapping) for heads in given.values()):
        raise TypeError(f"Vectors are a mapping from layers to heads to numbers, got {quoted(given)}.")
    listed = HeadList.parse({layer: list(heads) for layer, heads in given.items()}).heads
    named = {int(layer): {int(head): numbers for head, numbers in heads.items()} for layer, heads in given.items()}
    found = {
        layer: {head: _numbers(named[layer][head], layer, head) for head in heads} for layer, heads in listed.items()
    }
    if len(sizes := sorted({len(vector) for of_layer in found.values() for vector in of_layer.values()})) > 1:
        raise ValueError(f"Vectors of heads must be of one length, got {sizes}.")
    return found


def _numbers(given: Any, layer: int, head: int) -> tuple[float, ...]:
    is_list = isinstance(given, Sequence) and not isinstance(given, str) and len(given) > 0
    if not is_list or any(isinstance(number, bool) or not isinstance(number, int | float) for number in given):
        raise TypeError(f"Head {head} of layer {layer} must have a list of numbers, got {quoted(given)}.")
    if not all(math.isfinite(number) for number in given):
        raise ValueError(f"Head {head} of layer {layer} has a number that is not finite.")
    return tuple(map(float, given))
