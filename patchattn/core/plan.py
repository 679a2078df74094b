"""What is patched onto a model, as plain data: the unit that is applied, saved and listed."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ..files.documents import concerning, quoted
from .registry import variant_info
from .renaming import Renaming
from .settings import nearest
from .variant import VariantConfig

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Patch:
    """One variant on some sites: the unit that is applied, saved and listed.

    Attributes:
        variant: registered name.
        config: settings.
        sites: names of the attention modules, relative to the model.

    Raises:
        ValueError: the settings speak of a module that is none of these.
    """

    variant: str
    config: VariantConfig
    sites: tuple[str, ...]

    def __post_init__(self) -> None:
        for field in self.config.by_module:
            given = getattr(self.config, field)
            for name in given if isinstance(given, Mapping) else ():
                if name not in self.sites:
                    raise ValueError(
                        f"{self.variant!r} has {field} for {name!r}, which is not one of the attention modules it is on"
                        f"{nearest(str(name), list(self.sites))}"
                    )

    @property
    def looks_ahead(self) -> bool:
        """Whether rows of one call depend on later rows of it; see `VariantInfo.looks_ahead`."""
        return variant_info(self.variant).looks_ahead or self.config.looks_ahead

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of JSON and YAML types."""
        return {"variant": self.variant, "config": self.config.to_dict(), "sites": list(self.sites)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Patch":
        """The inverse of `to_dict`; raises ValueError or TypeError on anything it does not know."""
        if not isinstance(values, Mapping):
            raise TypeError(f"A patch is described by a dictionary, got {type(values).__name__}.")
        expected = ["variant", "config", "sites"]
        for key in values:
            if key not in expected:
                raise ValueError(f"A patch has no field {quoted(key)}{nearest(str(key), expected)}")
        if missing := [key for key in expected if key not in values]:
            raise ValueError(f"A patch needs the fields {', '.join(expected)}; {', '.join(missing)} is missing.")
        sites = values["sites"]
        if not isinstance(sites, list | tuple) or not all(isinstance(site, str) for site in sites):
            raise TypeError(f"sites must be a list of module names, got {quoted(sites)}.")
        info = variant_info(values["variant"])
        with concerning(info.name):
            config = info.variant.config_class.from_dict(values["config"])
        return cls(info.name, config, tuple(sites))


def plan_dict(patches: Sequence[Patch]) -> dict[str, Any]:
    """The plan as a dictionary of JSON types."""
    return {"format_version": FORMAT_VERSION, "patches": [patch.to_dict() for patch in patches]}


def gathered(entries: Iterable[tuple[int, str, VariantConfig, str]]) -> list[Patch]:
    """The patches on a model, outermost first, from what its attention modules say each.

    Args:
        entries: number of the patch, name of the variant, its settings, name of the attention module.
    """
    found: dict[tuple[int, str, str], tuple[VariantConfig, list[str]]] = {}
    for number, variant, config, site in entries:
        key = (number, variant, json.dumps(config.to_dict(), sort_keys=True, default=repr))
        found.setdefault(key, (config, []))[1].append(site)
    ordered = sorted(found.items(), key=lambda item: item[0][0])  # stable: towers patched apart share numbers
    return [Patch(variant, narrowed(config, sites), tuple(sites)) for (_, variant, _), (config, sites) in ordered]


def narrowed(config: VariantConfig, sites: Sequence[str]) -> VariantConfig:
    """Settings with what they hold for these attention modules alone."""
    return _by_module(config, lambda given: {name: value for name, value in given.items() if name in sites})


def renamed_config(config: VariantConfig, renaming: Renaming) -> VariantConfig:
    """Settings by module, with those modules' names from where the model is now seen; without those not seen there."""

    def renamed(given: Mapping[str, Any]) -> dict[str, Any]:
        names = {old: renaming.get(old) for old in given}
        return {name: _renamed_paths(given[old], renaming) for old, name in names.items() if name is not None}

    return _by_module(config, renamed)


def _by_module(config: VariantConfig, change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> VariantConfig:
    """Settings whose dictionaries by module are changed; one that becomes empty is as if it had not been given."""
    default = {item.name: item.default for item in fields(config)}
    given = {name: getattr(config, name) for name in config.by_module}
    given = {name: value for name, value in given.items() if isinstance(value, Mapping) and value}
    changed = {name: change(value) or default[name] for name, value in given.items()}
    return replace(config, **changed) if changed else config


def _renamed_paths(value: Any, renaming: Renaming) -> Any:
    """A list of modules' paths by their new names, also within a dictionary; any other value as it is."""
    if isinstance(value, Mapping):
        return {name: _renamed_paths(part, renaming) for name, part in value.items()}
    if isinstance(value, list) and value and all(isinstance(path, str) for path in value):
        return [name for path in value if (name := renaming.get(path)) is not None]
    return value
