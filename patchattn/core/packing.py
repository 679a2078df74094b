"""The patch of an attention module as a tensor of bytes among its others: whatever saves those saves the patch.

A configuration would not do: several models may share one, a part of a model has names of its own, and a model that was
loaded without its patch keeps the configuration.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..files.documents import parse_json
from .plan import FORMAT_VERSION, Patch, gathered, narrowed, renamed_config
from .registry import variant_info
from .renaming import Renaming
from .variant import VariantConfig

CHILD = "patchattn"  # the name under which a chain of variants is attached to an attention module
SETTINGS = "_extra_state"  # and torch's name for what a module adds to its state dict


class Packed(NamedTuple):
    """What the bytes say.

    Attributes:
        module: name of the attention module in what was saved.
        site: its name in the object that was patched, which settings by module use.
        variants: number of the patch, name, and settings of each variant, outermost first.
    """

    module: str
    site: str
    variants: list[tuple[int, str, VariantConfig]]


def packed_settings(module: str, site: str, variants: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """`(n,)` uint8, on the CPU; see `Packed`."""
    content = {"format_version": FORMAT_VERSION, "module": module, "site": site, "variants": list(variants)}
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8, device="cpu")


def unpacked_settings(tensor: torch.Tensor, where: str) -> Packed:
    """The inverse of `packed_settings`.

    Raises:
        ValueError: it is damaged, of a newer format, or names what is not known; the message begins with `where`.
    """
    try:
        content = parse_json(bytes(tensor.tolist()).decode(), where)
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"format version {version!r}, where this patchattn reads {FORMAT_VERSION}")
        variants = []
        for entry in content["variants"]:
            info = variant_info(entry["variant"])
            variants.append((int(entry["patch"]), info.name, info.variant.config_class.from_dict(entry["config"])))
        return Packed(str(content["module"]), str(content["site"]), variants)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{where}: the settings of its variants cannot be read ({reason}).") from error


def packed_plan(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[Patch]:
    """The patches, outermost first, that the settings of several attention modules describe.

    Args:
        tensors: where each comes from, for messages, and its bytes.

    Raises:
        ValueError: as `unpacked_settings`.
    """
    entries = []
    for where, tensor in tensors:
        packed = unpacked_settings(tensor, where)
        try:
            renaming = Renaming.of(packed.site, packed.module)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        for number, name, config in packed.variants:
            entries.append((number, name, renamed_config(config, renaming), packed.module))
    return gathered(entries)


def refuse_other_settings(site: str, saved: torch.Tensor, own: torch.Tensor) -> None:
    """ValueError where tensors to be loaded were saved from other variants, or from other settings of them."""
    theirs, ours = unpacked_settings(saved, site), unpacked_settings(own, site)
    try:
        renaming = Renaming.of(theirs.site, ours.site)
    except ValueError:
        renaming = Renaming()
    expected = [(name, narrowed(config, [ours.site])) for _, name, config in ours.variants]
    given = [(name, narrowed(renamed_config(config, renaming), [ours.site])) for _, name, config in theirs.variants]
    if [(name, config.to_dict()) for name, config in given] != [(name, c.to_dict()) for name, c in expected]:
        raise ValueError(
            f"These weights were trained under another patch. {site} is patched with {_shown(expected)}, "
            f"and they are of {_shown(given)}: call patchattn.unpatch_model(model), patch the model with theirs, then "
            "load them."
        )


def _shown(variants: Sequence[tuple[str, VariantConfig]]) -> str:
    return " and ".join(f"{name} ({config})" for name, config in variants)[:400]
