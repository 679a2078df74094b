"""The two files of a saved patch: `patchattn_config.json` and `patchattn_model.safetensors`.

The first holds format version, plan, base model, geometry of the patched sites and the digest of the second; the second
the variants' tensors by their names in the base model's state dict, possibly none.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from ..core.plan import FORMAT_VERSION, Patch
from ..files.documents import naming, quoted, read_json_object, write_json
from ..files.folders import settled

CONFIG_FILE = "patchattn_config.json"
TENSORS_FILE = "patchattn_model.safetensors"
_DIGEST = "tensors_sha256"


@dataclass(frozen=True)
class SavedPatch:
    """What `patchattn_config.json` says.

    Attributes:
        patches: outermost first.
        base: `name_or_path`, `revision`, `model_type` and `architecture` of the base model.
        sites: name of each patched attention module to its `AttentionSite.geometry()`.
        path: the file itself.
        digest: SHA-256 of the file with the tensors.
    """

    patches: tuple[Patch, ...]
    base: Mapping[str, Any]
    sites: Mapping[str, Mapping[str, Any]]
    path: Path
    digest: str


def write_patch(folder: Path, content: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write both files.

    Args:
        folder: is there.
        content: of `patchattn_config.json`, without the digest.
        tensors: contiguous, on the CPU.

    Raises:
        ValueError: a tensor holds what is not a finite number; nothing is then written.
    """
    if bad := [name for name, tensor in tensors.items() if not is_finite(tensor)]:
        raise ValueError(f"{bad[0]} holds values that are not finite numbers: nothing was saved.")
    save_file(dict(tensors), folder / TENSORS_FILE, metadata={"format": "pt"})
    with open(folder / TENSORS_FILE, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    write_json(folder / CONFIG_FILE, {**content, _DIGEST: digest})


def read_patch(folder: Path) -> SavedPatch:
    """Read and validate `patchattn_config.json`; ValueError on whatever is wrong with it."""
    path = folder / CONFIG_FILE
    if not os.path.isfile(path):
        raise ValueError(
            f"There is no {CONFIG_FILE} in {folder}. A whole model written by save_pretrained is loaded by "
            "patchattn.from_pretrained."
        )
    content = read_json_object(path)
    patches = read_plan(content, path)
    base, sites, digest = content.get("base_model"), content.get("sites"), content.get(_DIGEST)
    if not (isinstance(base, dict) and isinstance(sites, dict) and all(isinstance(s, dict) for s in sites.values())):
        raise ValueError(f"{path}: base_model, sites and each of the sites must be dictionaries.")
    facts = ("name_or_path", "revision", "model_type", "architecture")
    if wrong := [name for name in facts if not isinstance(base.get(name), str | None)]:
        raise ValueError(f"{path}: {wrong[0]} of base_model must be a text or null, got {quoted(base[wrong[0]])}.")
    if unknown := sorted({name for patch in patches for name in patch.sites} - set(sites)):
        raise ValueError(f"{path}: sites says nothing about {quoted(unknown[0])}, which is patched.")
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"{path}: {_DIGEST} must be the SHA-256 of {TENSORS_FILE}, got {quoted(digest)}.")
    return SavedPatch(tuple(patches), base, sites, path, digest)


def read_plan(content: Any, path: Path | str) -> list[Patch]:
    """The patches of a plan (see `plan.plan_dict`); ValueError, naming `path`, on whatever is wrong with it."""
    version = content.get("format_version") if isinstance(content, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"{path}: format_version must be a positive integer, got {quoted(version)}.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {quoted(version)}; this patchattn reads up to {FORMAT_VERSION}. Upgrade "
            "patchattn."
        )
    entries = content.get("patches")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: patches must be a list of at least one patch, got {quoted(entries)}.")
    try:
        return [Patch.from_dict(entry) for entry in entries]
    except (TypeError, ValueError) as error:
        raise ValueError(str(naming(path, error))) from error


def read_tensors(saved: SavedPatch) -> dict[str, torch.Tensor]:
    """The tensors that belong to a `patchattn_config.json`; ValueError if they are not there, damaged or others."""
    path = saved.path.with_name(TENSORS_FILE)
    if not path.is_file():
        raise ValueError(f"There is no {TENSORS_FILE} beside {saved.path}.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    if hashlib.sha256(content).hexdigest() != saved.digest:
        raise ValueError(f"{path} is damaged, or of another save than {CONFIG_FILE} beside it: its SHA-256 differs.")
    try:
        return load(content)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}.") from error


def read_both(folder: Path) -> tuple[SavedPatch, dict[str, torch.Tensor]]:
    """Both files, of one save; ValueError as `read_patch` and `read_tensors`."""

    def read() -> tuple[SavedPatch, dict[str, torch.Tensor]]:
        saved = read_patch(folder)
        return saved, read_tensors(saved)

    return settled(folder, read)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite numbers."""
    return tensor.is_meta or bool(torch.isfinite(tensor).all())
