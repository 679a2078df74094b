"""Which variants there are, by name.

A shipped one is known by its module, which registers it when it is first asked for. Nothing here imports torch before
that.
"""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .variant import Kind, VariantInfo

_MODULES: dict[str, str] = {}
_REGISTRY: dict[str, "VariantInfo"] = {}


def offer(modules: Mapping[str, str]) -> None:
    """Make variants known by the modules that register them: name of the variant to dotted name of the module."""
    _MODULES.update(modules)


def register_variant(info: "VariantInfo") -> None:
    """Make a variant known under its name.

    Raises:
        ValueError: the name is taken or not a lower-case identifier, or a capability is unknown.
        TypeError: the variant or its configuration class is of the wrong kind.
    """
    from .variant import ALL_CAPABILITIES, Variant, VariantConfig, VariantInfo

    if not isinstance(info, VariantInfo):
        raise TypeError(f"register_variant expects a VariantInfo, got {type(info).__name__}.")
    if not (info.name.isidentifier() and info.name == info.name.lower()):
        raise ValueError(f"A variant's name must be a lower-case identifier, got {info.name!r}.")
    if (known := _find(info.name)) is not None and known.variant is not info.variant:
        raise ValueError(f"The variant {info.name!r} is registered already; choose another name.")
    if not (isinstance(info.variant, type) and issubclass(info.variant, Variant)):
        raise TypeError(f"Variant {info.name!r}: expected a subclass of patchattn.Variant, got {info.variant!r}.")
    if not issubclass(getattr(info.variant, "config_class", object), VariantConfig):
        raise TypeError(f"Variant {info.name!r}: config_class must be a subclass of patchattn.VariantConfig.")
    if unknown := sorted(info.capabilities - ALL_CAPABILITIES):
        raise ValueError(f"Variant {info.name!r}: unknown capabilities {unknown}. Known: {sorted(ALL_CAPABILITIES)}.")
    _REGISTRY[info.name] = info


@contextmanager
def temporarily_registered(info: "VariantInfo") -> Iterator[str]:
    """The variant's name, known for the length of a `with` block."""
    register_variant(info)
    try:
        yield info.name
    finally:
        del _REGISTRY[info.name]


def list_variants(kind: "Kind | None" = None) -> list[str]:
    """Names of all registered variants, or of those of a kind, sorted."""
    return sorted(name for name in {*_MODULES, *_REGISTRY} if kind is None or variant_info(name).kind == kind)


def variant_info(name: str) -> "VariantInfo":
    """What is known of a variant: paper, settings, capabilities.

    Raises:
        ValueError: no such variant; the message names the nearest one.
        TypeError: `name` is not a string.
    """
    from .settings import nearest

    if not isinstance(name, str):
        raise TypeError(f"A variant is named by a string, got {type(name).__name__}.")
    info = _find(name)
    if info is None:
        raise ValueError(f"Unknown variant {name!r}{nearest(name, list_variants())}")
    return info


def _find(name: str) -> "VariantInfo | None":
    if name not in _REGISTRY and name in _MODULES:
        importlib.import_module(_MODULES[name])
    return _REGISTRY.get(name)
