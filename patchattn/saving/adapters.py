"""PEFT's adapters on patched models: what is saved says which patch it was trained on, and goes onto no other.

An adapter learns what its model's attention computes; on another attention it gives other numbers, and nothing in PEFT
could tell. So, from the first use of patchattn in a process on, PEFT's own `save_pretrained` writes the patch beside
every adapter of a patched model, and what loads adapters, PEFT's or transformers', looks for it first.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..core.packing import CHILD
from ..core.patching import applied_patches, is_patched
from ..core.plan import Patch
from ..core.selection import base_model
from ..files.documents import read_json_object
from ..files.folders import replacing, settled
from ..files.untrusted import ADAPTER_CONFIG, found_file
from .checkpoint import as_named_in, learnt, patch_content
from .patch_files import CONFIG_FILE, TENSORS_FILE, SavedPatch, read_patch, read_tensors, write_patch

_PLACE = ("subfolder", "revision", "token", "cache_dir")


@functools.cache
def guard_adapters() -> None:
    """Have PEFT save patches with adapters, and have PEFT and transformers load adapters only where they fit."""
    from peft import PeftMixedModel, PeftModel

    _change(PeftModel, "save_pretrained", _saving)
    for owner in (PeftModel, PeftMixedModel, PreTrainedModel):
        _change(owner, "load_adapter", _loading)
    for owner in (PeftModel, PeftMixedModel):
        # A class method, so that what it is bound to comes before the model.
        changed = _checking(owner.from_pretrained.__func__)
        owner.from_pretrained = classmethod(changed)


def _change(owner: Any, name: str, around: Callable[[Any], Any]) -> None:
    setattr(owner, name, around(getattr(owner, name)))


def _saving(original: Any) -> Any:
    """`PeftModel.save_pretrained` that writes the patch into the folder of every adapter it saves."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = _given(signature, self, *args, **kwargs)
        if not given["is_main_process"]:
            return original(self, *args, **kwargs)
        names = [name for name in given["selected_adapters"] or self.peft_config if name in self.peft_config]
        root = Path(given["save_directory"])
        folders = {name: root if name == "default" else root / name for name in names}
        if not is_patched(self):
            for folder in folders.values():
                if (folder / CONFIG_FILE).is_file():
                    raise ValueError(
                        f"{folder} holds a patch, and this model has none: beside it, its adapter would be taken for "
                        f"one of a patched model. Save elsewhere, or take {CONFIG_FILE} away first."
                    )
            return original(self, *args, **kwargs)
        contents = {name: patch_content(self, adapter=name, whole=given.get("state_dict")) for name in names}
        result = original(self, *args, **kwargs)
        for name, (content, tensors) in contents.items():
            with replacing(folders[name]) as folder:
                write_patch(folder, content, tensors)
        return result

    return save_pretrained


def _loading(original: Any) -> Any:
    """A model's `load_adapter` that refuses what was trained on another patch, and fills in what only the patch has."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = _given(signature, self, *args, **kwargs)
        others = set(getattr(self, "peft_config", {})) - {given["adapter_name"] or "default"}
        tensors = _beside(self, list(given.values())[1], given, others)
        result = original(self, *args, **kwargs)
        with torch.no_grad():
            for name, own in learnt(base_model(self)).items() if tensors else ():
                own.copy_(tensors[name])
        return result

    return load_adapter


def _checking(original: Any) -> Any:
    """`from_pretrained` of a class of PEFT that refuses before it changes the model."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        given = _given(signature, cls, *args, **kwargs)
        _, model, source, *_ = given.values()
        _beside(model, source, given, set(getattr(model, "peft_config", {})))
        return original(cls, *args, **kwargs)

    return from_pretrained


def _given(signature: inspect.Signature, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name, defaults and further keywords among them; TypeError as the call itself."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    named = dict(bound.arguments)
    for further in ("kwargs", "adapter_kwargs"):
        named |= named.pop(further, None) or {}
    return named


def _beside(
    model: nn.Module, source: Any, given: Mapping[str, Any], others: Collection[str]
) -> dict[str, torch.Tensor]:
    """The tensors of the patch beside an adapter that come with the patch alone; none where there is no patch.

    Args:
        model: what the adapter is to be loaded into.
        source: folder or Hub repository of the adapter; `None` where its weights are handed over.
        given: the arguments of the call that loads it, which say where in `source`.
        others: names of the adapters that the model keeps.

    Raises:
        ValueError: the model is not patched as the one was that the adapter was trained on.
    """
    place = {key: given[key] for key in _PLACE if given.get(key) is not None}
    path = None if source is None else found_file(source, CONFIG_FILE, **place)
    adapter = None if path is None else found_file(source, ADAPTER_CONFIG, **place)
    if path is None or adapter is None:
        return {}

    def read() -> tuple[SavedPatch, dict[str, torch.Tensor]]:
        found_file(source, TENSORS_FILE, **place)
        saved = read_patch(path.parent)
        return saved, read_tensors(saved)

    base = base_model(model)
    saved, tensors = as_named_in(base, *settled(path.parent, read))
    here = applied_patches(base)
    ways = (
        f"patchattn.from_pretrained({str(source)!r}) loads base model, patch and adapter; or call "
        f"patchattn.load_patch(model, {str(path.parent)!r}) on the unpatched model, before its adapter."
    )
    if [patch.to_dict() for patch in here] != [patch.to_dict() for patch in saved.patches]:
        raise ValueError(
            f"{path.parent}: this adapter was trained on a model patched with {_shown(saved.patches)}; this "
            f"{type(base).__name__} is {'patched with ' + _shown(here) if here else 'not patched'}. {ways}"
        )
    if CHILD in (read_json_object(adapter).get("modules_to_save") or ()):
        return {}
    for name, own in learnt(base).items():
        if name not in tensors or tensors[name].shape != own.shape:
            raise ValueError(f"{path.parent}: {name} is missing, or of another shape than the model's. {ways}")
        if others and not torch.equal(own.cpu(), tensors[name].to(own.dtype)):
            raise ValueError(
                f"{path.parent}: this adapter was trained beside another {name} than that of this model, which its "
                f"adapters {', '.join(sorted(others))} need. Load it into a model of its own."
            )
    return tensors


def _shown(patches: Sequence[Patch]) -> str:
    return " and ".join(f"{patch.variant} ({patch.config}; {len(patch.sites)} modules)" for patch in patches)[:600]
