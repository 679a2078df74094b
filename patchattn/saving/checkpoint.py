"""A patch on disk, and back: `save_patch`, `load_patch`, `from_pretrained`.

Nothing read here is executed or unpickled, and everything is validated before a model is touched.
"""

import functools
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import PreTrainedModel

from ..core.host import find_sites
from ..core.notices import note_patched
from ..core.packing import CHILD
from ..core.patching import active_chains, applied_patches, apply_patches, is_patched
from ..core.plan import Patch, plan_dict, renamed_config
from ..core.renaming import Renaming
from ..core.selection import base_model, expect_model
from ..core.settings import nearest
from ..core.shards import first_process, gathered, in_step
from ..core.variant import Variant
from ..files.documents import concerning, naming, quoted, read_json_object
from ..files.folders import replacing, settled
from ..files.untrusted import ADAPTER_CONFIG, refuse_code, refuse_pickled_adapter
from ..version import __version__
from .patch_files import CONFIG_FILE, TENSORS_FILE, SavedPatch, is_finite, read_both, read_patch, write_patch
from .pretrained import readable
from .whole_model import listed, patched_class, saved_plan
from .whole_model import model_class as transformers_class

ModelT = TypeVar("ModelT", bound=nn.Module)
_MODEL_CONFIG = "config.json"


def save_patch(model: nn.Module, directory: str | PathLike[str]) -> None:
    """Write a model's patch, without the base model: `patchattn_config.json` and `patchattn_model.safetensors`.

    Of a PeftModel whose variants are in `modules_to_save`, the active adapter's copy is written. Both files take the
    place of older ones together: a process that is killed while it saves leaves the older save or the new one. Of a
    model that several processes share, each must call it; the first one writes.

    Args:
        model: a patched model, or a PeftModel around one.
        directory: is made if it does not exist.

    Raises:
        ValueError: the model is not patched, or a variant's tensor holds what is not a finite number.
        TypeError: `model` is not a transformers model.
        OSError: the folder cannot be written; what it held is then as it was.
    """
    content, tensors = patch_content(model)
    with in_step(model):
        if first_process(model):
            with replacing(directory) as folder:
                write_patch(folder, content, tensors)


def patch_content(
    model: nn.Module, *, adapter: str | None = None, whole: Mapping[str, torch.Tensor] | None = None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What `patch_files.write_patch` writes of a patched model; raises as `save_patch`.

    Args:
        model: a patched model, or a PeftModel around one.
        adapter: whose copy of the variants is meant, where PEFT keeps one for each; the active one by default.
        whole: the state dict of `model` where its own tensors are sharded.
    """
    base = base_model(model)
    chains = active_chains(base, adapter)
    if not chains:
        raise ValueError(f"{type(base).__name__} is not patched; there is nothing to save. Call patch_model first.")
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()} if whole else {}
    tensors = {
        name: gathered((whole or {}).get(names.get(id(own), ""), own)).cpu().contiguous()
        for name, own in learnt(base, adapter).items()
    }
    config: Any = base.config

    content = {
        **plan_dict(applied_patches(base)),
        "patchattn_version": __version__,
        "base_model": {
            "name_or_path": config._name_or_path,
            "revision": getattr(config, "_commit_hash", None),
            "model_type": config.model_type,
            "architecture": type(base).__name__,
        },
        # before any surgery, as the base model has them
        "sites": {name: cast(Variant, next(chain.children())).site.geometry() for name, chain in chains.items()},
    }
    return content, tensors


def learnt(base: nn.Module, adapter: str | None = None) -> dict[str, torch.Tensor]:
    """The model's own tensors that a saved patch holds the values of, by the names they have there."""
    chains = active_chains(base, adapter)
    own = {f"{name}.{CHILD}.{key}": t for name, chain in chains.items() for key, t in chain.tensors().items()}
    variants = [variant for chain in chains.values() for variant in chain.variants().values()]
    carried = [name for variant in variants for name in variant.carried()]
    return own | {name: base.get_parameter(name) for name in carried}


def load_patch(
    model: ModelT,
    source: str | PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
) -> ModelT:
    """Put a saved patch onto an unpatched copy of its base model, in place.

    Args:
        model: the base model, or a PeftModel around it.
        source: folder written by `save_patch`, or name of a Hub repository that holds one.
        revision: of the Hub repository: a branch, tag or commit.
        token: for a private repository.
        cache_dir: where downloads are kept.

    Returns:
        The same model. The variants' tensors take the dtype and the device of the attention modules they go to.

    Raises:
        ValueError: the model is patched already; a file is missing, damaged or of a newer format; the patch names an
            unknown variant or was made on another base model; tensors are missing, left over or of another shape. The
            model is then as it was.
        TypeError: `model` is not a transformers model.
        NotImplementedError: as `patch_model`.
    """
    expect_model("load_patch", model)
    base = base_model(model)
    if is_patched(base):
        raise ValueError("load_patch expects an unpatched model; this one is patched. Call unpatch_model first.")
    with in_step(base):
        folder = _small_files(source, revision=revision, token=token, cache_dir=cache_dir)
        read = read_both(folder)
    with in_step(base):
        saved, tensors = as_named_in(base, *read)
        _refuse_other_base(base, saved)
    try:
        initialise = functools.partial(_fill, tensors=tensors, path=folder / TENSORS_FILE)
        apply_patches(base, saved.patches, initialise=initialise)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # what a damaged file makes a variant raise is of any kind
        if not isinstance(error, ValueError | TypeError | NotImplementedError):
            raise ValueError(f"{folder}: this patch cannot be put on ({type(error).__name__}: {error}).") from error
        raise naming(folder, error) from error
    note_patched(base, saved.patches)
    return model


def is_patch_alone(folder: Path) -> bool:
    """Whether a folder holds a patch that `save_patch` wrote, and no model."""
    return (folder / CONFIG_FILE).is_file() and not (folder / _MODEL_CONFIG).is_file()


def from_pretrained(
    source: str | PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
    subfolder: str | None = None,
    model_class: Any = None,
    **kwargs: Any,
) -> Any:
    """Load a base model and its patch in one call.

    Args:
        source: a folder or a Hub repository that holds a whole patched model (written by `save_pretrained`, the
            model's own or patchattn's), or a patch alone (`save_patch`), whose base model is then loaded from where it
            came from, or a PEFT adapter beside such a patch.
        revision: of the Hub repository: a branch, tag or commit.
        token: for a private repository; holds for the base model, too.
        cache_dir: where downloads are kept, those of the base model, too.
        subfolder: of `source`, where the files are.
        model_class: class of the model where it is your own; by default the class of transformers that was saved.
        kwargs: for the `from_pretrained` of the model's class: `dtype`, `device_map`, `attn_implementation`, ...
            A base model's weights are unpickled only with `use_safetensors=False`; an attention kernel of the Hub is
            fetched only where `attn_implementation` names it here.

    Returns:
        The patched model, in evaluation mode; a PeftModel if there is an adapter.

    Raises:
        ValueError: nothing there is a patch, a file is damaged, or as `load_patch`.
        TypeError: `model_class` is not a model class of transformers, nor derived from one.
    """
    if model_class is not None and not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise TypeError(f"model_class must be a class derived from transformers.PreTrainedModel, got {model_class!r}.")
    where: dict[str, Any] = {"token": token, "cache_dir": cache_dir}
    folder = _small_files(source, revision=revision, subfolder=subfolder, **where)
    place = {"revision": revision or "main", **({"subfolder": subfolder} if subfolder else {}), **where}

    def read() -> Any:
        if (folder / _MODEL_CONFIG).is_file():
            config = read_json_object(folder / _MODEL_CONFIG)
            plan = saved_plan(source, variant=kwargs.get("variant"), **place)
            if plan is not None:
                named = config.get("architectures")
                first = named[0] if isinstance(named, list) and named else named
                with concerning(folder / _MODEL_CONFIG):
                    kind = patched_class(model_class or (first if isinstance(first, str) else None))
                return kind.from_plan(plan, source, **place, **kwargs)
        return _base_and_patch(source, folder, place, model_class, kwargs)

    return settled(folder, read)


def _base_and_patch(
    source: str | PathLike[str], folder: Path, place: Mapping[str, Any], model_class: Any, kwargs: Mapping[str, Any]
) -> Any:
    """The base model of a patch alone, with it, and with the adapter beside it."""
    if not (folder / CONFIG_FILE).is_file():
        adapters = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
        there = f" There are adapters: choose one with subfolder={quoted(adapters[0])}." if adapters else ""
        raise ValueError(
            f"{str(source)!r} holds no patch: {CONFIG_FILE} is not there, nor weights that were saved from variants."
            f"{there}"
        )
    saved = read_patch(folder)
    name, base_revision = saved.base.get("name_or_path"), saved.base.get("revision")
    has_adapter = (folder / ADAPTER_CONFIG).is_file()
    if has_adapter:
        adapter = read_json_object(folder / ADAPTER_CONFIG)
        name, base_revision = adapter.get("base_model_name_or_path") or name, adapter.get("revision") or base_revision
        if not isinstance(name, str | None) or not isinstance(base_revision, str | None):
            raise ValueError(f"{folder / ADAPTER_CONFIG}: base_model_name_or_path and revision must be texts or null.")
    if not name:
        raise ValueError(
            f"{folder / CONFIG_FILE} does not say where its base model came from. Load the base model yourself and "
            f"call patchattn.load_patch(base_model, {str(folder)!r})"
            + (f", then PeftModel.from_pretrained(base_model, {str(folder)!r})." if has_adapter else ".")
        )
    with concerning(saved.path):
        base_kind: Any = model_class or transformers_class(saved.base.get("architecture"))
    if has_adapter:
        refuse_pickled_adapter(source, **place)
    where = {"revision": base_revision or "main", "token": place["token"], "cache_dir": place["cache_dir"]}
    base = _patched_base(base_kind, name, where, folder, kwargs)
    if not has_adapter:
        return base
    from peft import PeftModel

    with readable(source):
        return PeftModel.from_pretrained(base, str(source), **place)


def _patched_base(kind: Any, name: str, where: Mapping[str, Any], folder: Path, kwargs: Mapping[str, Any]) -> Any:
    """The base model with the patch in `folder`, which it may have been saved with in parts already."""
    with readable(name):
        plan = saved_plan(name, variant=kwargs.get("variant"), **where)
    if plan is None:
        with readable(name):
            refuse_code(kind, name, kwargs, **where)
            unpatched = kind.from_pretrained(name, **where, **{"use_safetensors": True, **kwargs})
        return load_patch(unpatched, folder)
    saved, tensors = read_both(folder)
    count = len(plan)
    if [patch.to_dict() for patch in plan] != [patch.to_dict() for patch in saved.patches[:count]]:
        raise ValueError(
            f"{saved.path}: this patch was made on {quoted(name)}, which is saved with another patch now. Load the "
            "model that is meant, and call patchattn.load_patch."
        )
    base = patched_class(kind).from_plan(plan, name, **where, **kwargs)
    apply_patches(base, saved.patches[count:])
    with concerning(folder):
        _fill(learnt(base), tensors, folder / TENSORS_FILE)
    return base


def _small_files(source: str | PathLike[str], subfolder: str | None = None, **where: Any) -> Path:
    """The folder itself, or a Hub repository's files that tell what it holds."""
    inside = Path(subfolder or "")
    if os.path.isdir(source):  # Path.is_dir raises OSError on a name that is too long
        return Path(source) / inside
    names = [str(inside / name) for name in (_MODEL_CONFIG, ADAPTER_CONFIG, CONFIG_FILE, TENSORS_FILE)]
    try:
        return Path(snapshot_download(str(source), allow_patterns=names, **where)) / inside
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{quoted(str(source))} is neither a folder nor a Hub repository that can be read: {str(error)[:500]}"
        ) from error


def as_named_in(
    base: nn.Module, saved: SavedPatch, tensors: dict[str, torch.Tensor]
) -> tuple[SavedPatch, dict[str, torch.Tensor]]:
    """A patch by the names that its modules have in this model, where it was saved from a part of it, or around it."""
    known, names = [site.name for site in find_sites(base)], list(saved.sites)
    if not names or set(names) <= set(known):
        return saved, tensors
    fitting = set()
    for other in known:
        with suppress(ValueError):
            renaming = Renaming.of(names[0], other)
            if {renaming.get(name) for name in names} <= set(known):
                fitting.add(renaming)
    if len(fitting) != 1:
        return saved, tensors  # to be refused, by the names it was saved with
    (renaming,) = fitting
    patches = tuple(
        Patch(p.variant, renamed_config(p.config, renaming), tuple(map(renaming, p.sites))) for p in saved.patches
    )
    sites = {renaming(name): geometry for name, geometry in saved.sites.items()}
    return replace(saved, patches=patches, sites=sites), {renaming(key): tensor for key, tensor in tensors.items()}


def _refuse_other_base(base: nn.Module, saved: SavedPatch) -> None:
    """Say which property of the base model differs from that of the model the patch was made on."""
    config: Any = base.config
    sites = {site.name: site.geometry() for site in find_sites(base)}
    name = saved.base.get("name_or_path") or "unnamed"
    made_on = f"{saved.path}: this patch was made on {saved.base.get('architecture')} ({name})"
    if config.model_type != saved.base.get("model_type"):
        raise ValueError(
            f"{made_on}, of model type {saved.base.get('model_type')!r}; got {type(base).__name__}, of model type "
            f"{config.model_type!r}."
        )
    for name, geometry in saved.sites.items():
        if name not in sites:
            raise ValueError(
                f"{made_on}; {type(base).__name__} has no attention module {name!r}{nearest(name, list(sites))}"
            )
        for key, here in sites[name].items():
            if geometry.get(key) != here:
                raise ValueError(
                    f"{made_on}, where {name} has {key} = {quoted(geometry.get(key))}; in the model given it is {here}."
                )


def _fill(wanted: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Copy tensors from a file into those of a patch, or raise ValueError and copy nothing."""
    if missing := [key for key in wanted if key not in tensors]:
        raise ValueError(f"{path}: {listed(missing, 'missing')}.")
    if extra := [key for key in tensors if key not in wanted]:
        raise ValueError(f"{path}: {listed(extra, 'left over: nothing in this patch has them')}.")
    for key, own in wanted.items():
        if own.shape != tensors[key].shape:
            raise ValueError(f"{path}: {key} has the shape {tuple(tensors[key].shape)}, expected {tuple(own.shape)}.")
        if own.is_floating_point() != tensors[key].is_floating_point():
            raise ValueError(f"{path}: {key} is of {tensors[key].dtype}, expected {own.dtype}.")
        if own.is_meta:
            raise ValueError("The base model is on the meta device; load its weights before its patch.")
        if not is_finite(tensors[key].to(own.dtype)):
            raise ValueError(f"{path}: {key} holds values that are not finite numbers in {own.dtype}.")
    with torch.no_grad():
        for key, own in wanted.items():
            own.copy_(tensors[key])
