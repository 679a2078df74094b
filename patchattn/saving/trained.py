"""What was trained, on a model for the time of a block: a saved patch, a LoRA adapter, or both of one folder."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.patching import is_patched, unpatch_model
from ..core.selection import base_model
from ..files.documents import quoted, read_json_object
from ..files.untrusted import ADAPTER_CONFIG, found_file, refuse_pickled_adapter
from .checkpoint import load_patch
from .patch_files import CONFIG_FILE
from .pretrained import readable


def holds_adapter(source: str | PathLike[str]) -> bool:
    """Whether a folder or a Hub repository holds an adapter of PEFT."""
    return found_file(source, ADAPTER_CONFIG) is not None


def holds_patch(source: str | PathLike[str]) -> bool:
    """Whether a folder or a Hub repository holds a saved patch."""
    return found_file(source, CONFIG_FILE) is not None


@contextmanager
def loaded(model: nn.Module, source: str | PathLike[str], *, adapter: bool = True) -> Iterator[None]:
    """The patch and the adapter that a folder holds, on a model that is afterwards as it was.

    Args:
        model: unpatched, without adapters.
        source: folder or Hub repository of a saved patch, of a LoRA adapter, or of an adapter with the patch beside it
            that it was trained on.
        adapter: whether the adapter is put on.

    Raises:
        ValueError: there is neither; as `load_patch`; or an adapter that is not LoRA's, whose weights would have to be
            unpickled, that does not fit the model, or that would come beside another one.
    """
    with_adapter = holds_adapter(source)
    if holds_patch(source) or not with_adapter:
        load_patch(model, source)
    try:
        if with_adapter and adapter:
            with _adapted(base_model(model), source):
                yield
        else:
            yield
    finally:
        if is_patched(model):
            unpatch_model(model)


@contextmanager
def _adapted(base: Any, source: str | PathLike[str]) -> Iterator[None]:
    """A LoRA adapter on a model; the modules that it takes the places of come back afterwards."""
    from peft import PeftModel

    config = refuse_pickled_adapter(source)
    about = {} if config is None else read_json_object(config)
    if about.get("peft_type") != "LORA" or about.get("alora_invocation_tokens"):
        kind = "an activated LoRA" if about.get("peft_type") == "LORA" else about.get("peft_type")
        raise ValueError(
            f"{source}: expected a LoRA adapter, got {quoted(kind)}, which needs PEFT's own forward. Save the whole "
            "model with it, or load it with patchattn.from_pretrained."
        )
    if hasattr(base, "peft_config"):
        raise ValueError(f"{source}: the model has adapters already: {', '.join(base.peft_config)}.")
    children = [(module, dict(module._modules)) for module in base.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    try:
        with readable(source):
            PeftModel.from_pretrained(base, str(source))
        yield
    finally:  # PEFT's unload would leave modules that were trained whole, such as a new head, in their trained state
        for module, own in children:
            module._modules.clear()
            module._modules.update(own)
        for parameter, wanted in trained:
            parameter.requires_grad_(wanted)
        base.__dict__.pop("peft_config", None)


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that the adapters on a model hold, modules that were trained whole among it, by adapter and name."""
    base: Any = base_model(model)
    if not hasattr(base, "peft_config"):
        return {}
    from peft import get_peft_model_state_dict

    return {
        f"{adapter}.{name}": tensor
        for adapter in base.peft_config
        for name, tensor in get_peft_model_state_dict(base, adapter_name=adapter, save_embedding_layers=False).items()
        if not name.endswith("_extra_state")  # torch's name for what is no tensor of the model: settings of a patch
    }


def adapter_parameters(model: nn.Module) -> int:
    """Number of the values that the adapters on a model hold."""
    return sum(tensor.numel() for tensor in adapter_tensors(model).values())


def own_parameters(model: nn.Module) -> int:
    """Number of a model's parameters without what adapters hold beside them: LoRA merges into the weights."""
    return sum(parameter.numel() for parameter in model.parameters()) - adapter_parameters(model)


def folder_digest(folder: str | PathLike[str]) -> str | None:
    """Of the files of a saved patch or adapter; None where that is no folder here."""
    path = Path(folder)
    if not path.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted([*path.glob("*.safetensors"), *path.glob(ADAPTER_CONFIG), *path.glob(CONFIG_FILE)]):
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
