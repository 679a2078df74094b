"""Whole models that were saved patched: their weights say how, and are loaded into a model patched in that way."""

import functools
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from os import PathLike
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from safetensors.torch import safe_open

from ..core.packing import CHILD, SETTINGS, packed_plan
from ..core.patching import active_chains, apply_patches, share_out
from ..core.plan import Patch
from ..core.shards import gathered
from ..files.documents import quoted, read_json_object
from ..files.untrusted import found_file, refuse_code
from .patch_files import is_finite
from .pretrained import readable

CODE_MODULE = "modeling_patchattn"  # the Hub's custom-code entry, without its .py
_building: ContextVar[list[Patch] | None] = ContextVar("patchattn_building", default=None)


def saved_plan(
    source: str | PathLike[str], *, subfolder: str | None = None, variant: str | None = None, **where: Any
) -> list[Patch] | None:
    """The patches of a whole model that was saved patched, outermost first; `None` if it was saved unpatched.

    Args:
        source: folder or Hub repository with the weights as safetensors.
        subfolder: in it, where the weights are.
        variant: of the weights' file names, such as `fp16`.
        where: `revision`, `token` and `cache_dir`, of a Hub repository.

    Raises:
        ValueError: a file is damaged, or its settings cannot be read.
    """
    middle = "" if variant is None else f".{variant}"
    index = found_file(source, f"model.safetensors.index{middle}.json", subfolder=subfolder, **where)
    single = f"model{middle}.safetensors"
    if index is None:
        shards = {single: None}
    else:
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index}: weight_map must be a dictionary, got {type(weight_map).__name__}.")
        shards = dict.fromkeys(str(shard) for key, shard in weight_map.items() if _is_settings(key))
    found = []
    for shard in shards:
        path = found_file(source, shard, subfolder=subfolder, **where)
        if path is None:
            continue
        try:
            with safe_open(path, framework="pt") as file:
                found += [(f"{path}: {key}", file.get_tensor(key)) for key in file.keys() if _is_settings(key)]  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or not a safetensors file: {error}.") from error
    return packed_plan(found) or None


def _is_settings(key: str) -> bool:
    return key.endswith(f".{CHILD}.{SETTINGS}")


def model_class(architecture: str | None) -> Any:
    """The transformers model class of that name; ValueError if there is none. Code of other origin is never run."""
    found = getattr(transformers, architecture, None) if isinstance(architecture, str) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(
            f"The model's class is given as {quoted(architecture)}, which is not a model class of transformers "
            f"{transformers.__version__}. If it is yours, say so: patchattn.from_pretrained(..., model_class=...)."
        )
    return found


@functools.cache
def patched_class(architecture: str | type | None, *, serves: bool = False) -> Any:
    """A stand-in for a transformers model class that loads patched models; for custom code on the Hub.

    It patches itself when it is built, by the plan in the weights, so that transformers' own loading finds a place for
    every tensor, whatever it renames, shards, casts or maps to devices. The loaded model is of the original class.

    Args:
        architecture: name of a model class of transformers, or a class of your own.
        serves: a patch that cannot be loaded is a RuntimeError: `transformers serve` takes a ValueError for leave to
            load the plain class.

    Raises:
        ValueError: transformers has no such class; and, when loading, tensors of variants are missing, left over or of
            another shape.
    """
    original: Any = architecture if isinstance(architecture, type) else model_class(architecture)

    class Patched(original):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            plan = _building.get()
            if plan is None:
                raise ValueError(f"A patched {original.__name__} is made by from_pretrained: its weights say how.")
            apply_patches(self, plan)

        @classmethod
        def from_pretrained(cls, source: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                plan = saved_plan(source, variant=kwargs.get("variant"), **_place(kwargs))
                if plan is not None:
                    return cls.from_plan(plan, source, *args, **kwargs)
            except ValueError as error:
                if not serves:
                    raise
                raise RuntimeError(f"{str(source)!r} cannot be served with its patch: {error}") from error
            raise ValueError(f"{str(source)!r} holds no patch: nothing in its weights was saved from a variant.")

        @classmethod
        def from_plan(cls, plan: list[Patch], source: Any, *args: Any, **kwargs: Any) -> Any:
            """`from_pretrained` for who knows the `saved_plan` of that source already."""
            with readable(source):
                refuse_code(original, source, kwargs, **_place(kwargs))
            wants_info = kwargs.pop("output_loading_info", False)
            may_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
            # Mismatches are tolerated there and refused here, by an error that says which.
            kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "use_safetensors": True}
            token = _building.set(plan)
            try:
                with readable(source):
                    model, info = super().from_pretrained(source, *args, **kwargs)
            except ValueError as error:
                if isinstance(error.__cause__, SafetensorError):
                    what = f"is damaged or not a safetensors file: {error.__cause__}"
                    raise ValueError(f"{_damaged_file(source)} {what}.") from error
                raise
            finally:
                _building.reset(token)
            share_out(model)
            variants = [variant for chain in active_chains(model).values() for variant in chain.variants().values()]
            carried = [name for variant in variants for name in variant.carried()]
            _refuse_incomplete(source, info, may_mismatch, carried)
            for name, tensor in model.state_dict().items():
                if f".{CHILD}." in name and not is_finite(gathered(tensor)):
                    raise ValueError(f"{str(source)!r}: {name} holds values that are not finite numbers.")
            model.__class__ = original
            # A copy saved from here has no code file beside it.
            if CODE_MODULE in str(getattr(model.config, "auto_map", None)):
                del model.config.auto_map
            return (model, info) if wants_info else model

    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Patched, attribute, getattr(original, attribute))
    return Patched


def _place(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Where files are, of the arguments of `from_pretrained`."""
    names = ("subfolder", "revision", "token", "cache_dir")
    return {name: kwargs[name] for name in names if kwargs.get(name) is not None}


def _refuse_incomplete(source: Any, info: Mapping[str, Any], may_mismatch: bool, carried: Sequence[str]) -> None:
    """Turn what transformers only reports into an error, where it concerns variants, what they carry, or shapes."""
    mark = f".{CHILD}."
    mismatched = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    problems = {
        "missing": [key for key in info["missing_keys"] if mark in key or key in carried],
        "left over": [key for key in info["unexpected_keys"] if mark in key],
        "of another shape": [key for key in mismatched if mark in key or not may_mismatch],
    }
    if lines := [listed(keys, what) for what, keys in problems.items() if keys]:
        raise ValueError(f"The weights in {str(source)!r} do not fit the model: {'; '.join(lines)}.")


def _damaged_file(folder: str | PathLike[str]) -> str:
    """The first safetensors file that cannot be opened."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            return str(path)
    return f"A file of {str(folder)!r}"


def listed(keys: Sequence[str], what: str) -> str:
    """`3 tensors missing (a, b, ...)`."""
    shown = ", ".join(list(keys)[:2]) + (", ..." if len(keys) > 2 else "")
    return f"{len(keys)} tensor{'s' if len(keys) > 1 else ''} {what} ({shown})"
