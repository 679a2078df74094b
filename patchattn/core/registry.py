"""Which variants there are, by name.

A shipped one is known by its module, which registers it when it is first asked for. Nothing here imports torch before
that.
"""

import importlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .variant import Capability, Kind, VariantInfo

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


def list_variants(
    kind: "Kind | None" = None,
    *,
    family: str | None = None,
    needs_training: bool | None = None,
    capability: "Capability | Iterable[Capability] | None" = None,
) -> list[str]:
    """Names of the registered variants that are all of this, sorted; of all by default.

    Args:
        kind: what they act on, as in `VariantInfo.kind`.
        family: the mechanism, such as `temperature` or `pruning`, as in `VariantInfo.family`.
        needs_training: whether they are of use only after training.
        capability: what they support, such as `kv_cache`, or several that they all do.

    Raises:
        ValueError: there is no such kind, family or capability; the message names those there are.
        TypeError: an argument of the wrong type.
    """
    names = sorted({*_MODULES, *_REGISTRY})
    if all(choice is None for choice in (kind, family, needs_training, capability)):
        return names
    from .variant import ALL_CAPABILITIES, KINDS

    infos = [variant_info(name) for name in names]
    _refuse_unknown("kind", kind, KINDS)
    _refuse_unknown("family", family, {info.family for info in infos})
    if not isinstance(needs_training, bool | None):
        raise TypeError(f"needs_training must be True, False or None, got {needs_training!r}.")
    wanted = [] if capability is None else [capability] if isinstance(capability, str) else list(capability)
    for each in wanted:
        _refuse_unknown("capability", each, ALL_CAPABILITIES)
    return [
        info.name
        for info in infos
        if kind in (None, info.kind)
        and family in (None, info.family)
        and needs_training in (None, info.needs_training)
        and info.capabilities.issuperset(wanted)
    ]


def _refuse_unknown(what: str, given: object, known: Iterable[str]) -> None:
    from .settings import nearest

    if not isinstance(given, str | None):
        raise TypeError(f"A {what} is named by a string, got {type(given).__name__}.")
    if given is not None and given not in known:
        raise ValueError(f"There is no {what} {given!r}{nearest(given, list(known))}")


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
