"""What is asked of `patch_model`, as patches that fit the model; it is not touched."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .host import find_sites
from .plan import Patch
from .registry import variant_info
from .selection import select_sites
from .settings import nearest
from .sites import AttentionSite
from .variant import VariantInfo


def settings_per_variant(
    variant: str | Sequence[str], config: Any, settings: Mapping[str, Any]
) -> list[tuple[VariantInfo, Any]]:
    """Pair every variant with its settings."""
    names = [variant] if isinstance(variant, str) else variant
    if not isinstance(names, list | tuple) or not names:
        raise TypeError(
            f"variant must be a name or a list of names, got {variant!r}. Settings are keywords, or config."
        )
    infos = [variant_info(name) for name in names]
    if len(set(names)) != len(names):
        raise ValueError(f"The same variant twice on one layer: {list(names)}.")
    if config is not None and settings:
        raise ValueError(f"Give settings either as config or by name, not both: {', '.join(settings)}.")
    if len(infos) == 1:
        return [(infos[0], dict(settings) if config is None else config)]
    if settings:
        raise ValueError(
            f"With several variants, give settings per name: config={{{names[0]!r}: {dict(settings)!r}, ...}}."
        )
    if config is not None and not isinstance(config, Mapping):
        raise TypeError(f"With several variants, config must map names to settings, got {type(config).__name__}.")
    for name in config or {}:
        if name not in names:
            raise ValueError(f"config has settings for {name!r}{nearest(str(name), list(names))}")
    return [(info, (config or {}).get(info.name, {})) for info in infos]


def fitted(
    base: nn.Module,
    chosen: Sequence[tuple[VariantInfo, Any]],
    layers: int | Iterable[int] | None,
    modules: str | Iterable[str] | None,
) -> list[Patch]:
    """Variants with their settings as patches of a model; the arguments are those of `patch_model`, and what is raised.

    Processes that share a model must come to it together.
    """
    every = find_sites(base) if any(info.variant.acts_on_logits for info, _ in chosen) else []
    sites: list[AttentionSite] = []
    if not all(info.variant.acts_on_logits for info, _ in chosen):
        sites = select_sites(base, layers=layers, modules=modules)
    elif layers is not None or modules is not None:
        raise ValueError(
            f"{chosen[0][0].name!r} acts on logits and chooses its own attention modules: leave out layers and modules."
        )
    patches = []
    for info, given in chosen:
        configured, own = info.fitted(given, base, every if info.variant.acts_on_logits else sites)
        patches.append(Patch(info.name, configured, tuple(site.name for site in own)))
    return patches
