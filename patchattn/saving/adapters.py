"""PEFT's adapters on patched models: what is saved says which patch it was trained on, and goes onto no other.

An adapter learns what its model's attention computes; on another attention it gives other numbers, and nothing in PEFT
could tell. So, from the first use of patchattn in a process on, PEFT's own `save_pretrained` writes the patch beside
every adapter of a patched model, and what loads adapters, PEFT's or transformers', looks for it first.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..core.packing import CHILD
from ..core.patching import applied_patches, is_patched
from ..core.plan import Patch
from ..core.selection import base_model
from ..core.shards import gathered, is_part
from ..files.documents import read_json_object
from ..files.folders import replacing
from ..files.untrusted import ADAPTER_CONFIG, found_file
from .checkpoint import as_named_in, learnt, patch_content
from .patch_files import CONFIG_FILE, TENSORS_FILE, read_both, write_patch

_PLACE = ("subfolder", "revision", "token", "cache_dir")


@functools.cache
def guard_adapters() -> None:
    """Have PEFT save patches with adapters, and have PEFT and transformers load adapters only where they fit."""
    from peft import PeftMixedModel, PeftModel

    _change(PeftModel, "save_pretrained", _saving)
    for owner in (PeftModel, PeftMixedModel, PreTrainedModel):
        _change(owner, "load_adapter", _loading)
    for owner in (PeftModel, PeftMixedModel):
        _change(owner, "from_pretrained", _checking)


def whole_adapters(model: Any) -> dict[str, torch.Tensor] | None:
    """The tensors of a PeftModel's adapters by their names in it, where each process holds a part of them, or `None`.

    PEFT itself puts them together under tensor parallelism alone, not under FSDP2. Every process must call it.
    """
    from peft import get_peft_model_state_dict

    own = model.state_dict(keep_vars=True)
    saved = [get_peft_model_state_dict(model, state_dict=own, adapter_name=name) for name in model.peft_config]
    asked = {id(tensor) for adapter in saved for tensor in adapter.values()}
    found = {name: tensor for name, tensor in own.items() if id(tensor) in asked}
    if not any(is_part(tensor) for tensor in found.values()):
        return None
    return {name: gathered(tensor) for name, tensor in found.items()}


def _change(owner: Any, name: str, around: Callable[[dict[str, Any]], AbstractContextManager[None]]) -> None:
    """Have a method, of objects or of the class, run within what `around` makes of its arguments by name."""
    found = inspect.getattr_static(owner, name)
    original = getattr(found, "__func__", found)
    signature = inspect.signature(original)

    @functools.wraps(original)
    def changed(*args: Any, **kwargs: Any) -> Any:
        with around(_given(signature, *args, **kwargs)):
            return original(*args, **kwargs)

    setattr(owner, name, classmethod(changed) if isinstance(found, classmethod) else changed)


@contextmanager
def _saving(given: dict[str, Any]) -> Iterator[None]:
    """`PeftModel.save_pretrained`, which then writes the patch into the folder of every adapter that it saves."""
    model, *_ = given.values()
    if not given["is_main_process"]:
        yield
        return
    names = [name for name in given["selected_adapters"] or model.peft_config if name in model.peft_config]
    root = Path(given["save_directory"])
    folders = {name: root if name == "default" else root / name for name in names}
    contents = {}
    if is_patched(model):
        contents = {name: patch_content(model, adapter=name, whole=given.get("state_dict")) for name in names}
    elif taken := [folder for folder in folders.values() if (folder / CONFIG_FILE).is_file()]:
        raise ValueError(
            f"{taken[0]} holds a patch, and this model has none: beside it, its adapter would be taken for one of a "
            f"patched model. Save elsewhere, or remove {CONFIG_FILE} first."
        )
    yield
    for name, (content, tensors) in contents.items():
        with replacing(folders[name]) as folder:
            write_patch(folder, content, tensors)


@contextmanager
def _loading(given: dict[str, Any]) -> Iterator[None]:
    """A model's `load_adapter`: it refuses what was trained on another patch, and fills in what only the patch has."""
    model, source, *_ = given.values()
    others = set(getattr(model, "peft_config", {})) - {given["adapter_name"] or "default"}
    tensors = _beside(model, source, given, others)
    yield
    with torch.no_grad():
        for name, own in learnt(base_model(model)).items() if tensors else ():
            own.copy_(tensors[name])


@contextmanager
def _checking(given: dict[str, Any]) -> Iterator[None]:
    """`from_pretrained` of a class of PEFT, which refuses before it changes the model."""
    _, model, source, *_ = given.values()
    _beside(model, source, given, set(getattr(model, "peft_config", {})))
    yield


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
    found_file(source, TENSORS_FILE, **place)  # of a Hub repository, brings it to the same folder
    base = base_model(model)
    saved, tensors = as_named_in(base, *read_both(path.parent))
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
