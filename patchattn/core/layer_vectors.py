"""A vector for the residual stream behind each of some layers, and variants that add it or put it in."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files.documents import naming, quoted, read_json_object, write_json
from .call import AttentionCall
from .chosen_rows import RowConfig
from .heads import BaseFacts, parse_facts
from .layer_outputs import LayerOutputVariant
from .settings import option
from .sites import AttentionSite

# As settings take them: a file, vectors by layer, or what `LayerVectors.to_dict` gives.
GivenVectors = (
    str
    | Path
    | Mapping[int, Sequence[float]]
    | Mapping[str, Sequence[float]]
    | Mapping[str, Mapping[str, Sequence[float]] | Mapping[str, str | int | None]]
)


@dataclass(frozen=True)
class LayerVectors:
    """Vectors by layer.

    Attributes:
        vectors: layer to `(E,)` numbers, E the width of the residual stream; layers are counted from 0.
        base: the model they are of, where it is known.
    """

    vectors: dict[int, tuple[float, ...]]
    base: BaseFacts | None = None

    def at(self, layer: int) -> "LayerVectors":
        """The one of a layer alone; ValueError if there is none."""
        if layer not in self.vectors:
            raise ValueError(f"There are vectors of the layers {sorted(self.vectors)}, got {layer}.")
        return LayerVectors({layer: self.vectors[layer]}, self.base)

    @classmethod
    def parse(cls, given: Any) -> "LayerVectors":
        """Read vectors: the path of a JSON file, or a mapping from layers to numbers.

        Raises:
            ValueError: the file is missing or not valid JSON, a field is unknown, there is no vector, lengths differ,
                or a number is not finite.
            TypeError: something else than layers and numbers.
        """
        if isinstance(given, LayerVectors):
            return given
        if isinstance(given, str | Path):
            content = read_json_object(given)
            try:
                return cls.parse(content)
            except (TypeError, ValueError) as error:
                raise naming(given, error) from error
        base = None
        if isinstance(given, Mapping) and "vectors" in given:
            if unknown := [key for key in given if key not in ("vectors", "base", "about")]:
                raise ValueError(f"Vectors of layers have the fields vectors, base and about, got {quoted(unknown)}.")
            base = None if given.get("base") is None else parse_facts(given["base"])
            given = given["vectors"]
        if not isinstance(given, Mapping) or not given:
            raise TypeError(f"Vectors are a file or a mapping from layers to numbers, got {quoted(given)}.")
        found = {_layer(layer): _numbers(numbers, layer) for layer, numbers in given.items()}
        if len(sizes := sorted({len(vector) for vector in found.values()})) > 1:
            raise ValueError(f"Vectors of layers must be of one length, got {sizes}.")
        return cls(found, base)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of JSON types, which `parse` takes."""
        vectors = {str(layer): list(vector) for layer, vector in sorted(self.vectors.items())}
        return {"vectors": vectors} if self.base is None else {"vectors": vectors, "base": vars(self.base).copy()}

    def save(self, path: str | Path, **about: Any) -> None:
        """Write them as a setting `vectors=path` reads them; `about` is noted beside them."""
        write_json(Path(path), {**self.to_dict(), "about": about})


def _layer(given: Any) -> int:
    number = int(given) if isinstance(given, str) and given.isdecimal() else given
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise TypeError(f"Layers are counted from 0, got {quoted(given)}.")
    return number


def _numbers(given: Any, layer: Any) -> tuple[float, ...]:
    is_list = isinstance(given, Sequence) and not isinstance(given, str) and len(given) > 0
    if not is_list or any(isinstance(one, bool) or not isinstance(one, int | float) for one in given):
        raise TypeError(f"Layer {layer} must have a list of numbers, got {quoted(given)}.")
    if not all(math.isfinite(one) for one in given):
        raise ValueError(f"Layer {layer} has a number that is not finite.")
    return tuple(map(float, given))


@dataclass(frozen=True, kw_only=True)
class LayerVectorConfig(RowConfig):
    """Settings of vectors for the residual stream."""

    vectors: GivenVectors | None = option(
        None,
        parse=lambda given: LayerVectors.parse(given).to_dict(),  # a saved patch holds them, not the name of a file
        help="A vector for the residual stream behind each of some layers: a file, or a mapping from layers to "
        "numbers. It must be given; layers=... of patch_model chooses among them.",
    )
    gain: float = option(
        1.0, help="Factor of what is there before; 0 puts the vector in its place.", minimum=-1e6, maximum=1e6
    )
    strength: float = option(1.0, help="Factor of the vectors.", minimum=-1e6, maximum=1e6)


class LayerVectorVariant(LayerOutputVariant):
    """The residual stream behind a layer becomes `gain * x + strength * vector`, at chosen tokens."""

    config: LayerVectorConfig

    def __init__(self, config: LayerVectorConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        given: Any = config.vectors or {"vectors": {}}  # parsed when the settings were made: not again in every layer
        self.vector: list[float] | None = given["vectors"].get(str(site.layer_index))

    @classmethod
    def fit(
        cls, config: LayerVectorConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[LayerVectorConfig, Sequence[AttentionSite]]:
        if config.vectors is None:
            if config.gain == 1.0 and config.strength == 0.0:
                return config, [site for site in sites if not site.is_cross]
            raise ValueError(f"{cls.__name__} needs vectors: a file, or a mapping from layers to numbers.")
        given = LayerVectors.parse(config.vectors)
        chosen = [site for site in sites if not site.is_cross and site.layer_index in given.vectors]
        if not chosen:
            raise ValueError(f"There are vectors of the layers {sorted(given.vectors)}, none of which is chosen.")
        if given.base is not None:
            for site in chosen:
                given.base.check(model, site, "list of vectors")
        return config, chosen

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"gain": 1.0, "strength": 0.0}

    @property
    def is_identity(self) -> bool:
        return self.vector is None or (self.config.gain == 1.0 and self.config.strength == 0.0)

    @property
    def keeps_state(self) -> bool:
        """The kv cache tells which token is which, also where the mask does not."""
        return not self.config.edits_all

    def chosen_rows(self, call: AttentionCall) -> torch.Tensor | None:
        return self.config.of_call(call)

    def changed(self, hidden: torch.Tensor) -> torch.Tensor:
        vector = self.vector
        if vector is None:  # of a patch without vectors, which is neutral
            return hidden
        if len(vector) != hidden.shape[-1]:
            raise ValueError(
                f"The vector has {len(vector)} numbers, but the layer of {self.site.name} hands on {hidden.shape[-1]}."
            )
        added = torch.tensor(vector, dtype=torch.float64) * self.config.strength
        return hidden * self.config.gain + added.to(device=hidden.device, dtype=hidden.dtype)
