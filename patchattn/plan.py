"""What is patched onto a model, as plain data: the unit that is applied, saved and listed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .settings import nearest
from .variant import VariantConfig, variant_info

CONFIG_KEY = "patchattn"  # under which a patched model's configuration carries the plan
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Patch:
    """One variant on some sites: the unit that is applied, saved and listed.

    Attributes:
        variant: registered name.
        config: settings.
        sites: names of the attention modules, relative to the model.
    """

    variant: str
    config: VariantConfig
    sites: tuple[str, ...]

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
                raise ValueError(f"A patch has no field {key!r}{nearest(str(key), expected)}")
        if missing := [key for key in expected if key not in values]:
            raise ValueError(f"A patch needs the fields {', '.join(expected)}; {', '.join(missing)} is missing.")
        sites = values["sites"]
        if not isinstance(sites, list | tuple) or not all(isinstance(site, str) for site in sites):
            raise TypeError(f"sites must be a list of module names, got {sites!r}.")
        info = variant_info(values["variant"])
        return cls(info.name, info.variant.config_class.from_dict(values["config"]), tuple(sites))


def plan_dict(patches: Sequence[Patch]) -> dict[str, Any]:
    """The plan as a model's `config.json` carries it under `patchattn`."""
    return {"format_version": FORMAT_VERSION, "patches": [patch.to_dict() for patch in patches]}
