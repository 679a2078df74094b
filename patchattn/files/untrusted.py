"""What a file may not ask for: weights that are unpickled, and kernels, which are code, from the Hub."""

import os
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import PreTrainedConfig

from .documents import quoted, read_json_object

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"


def found_file(source: str | PathLike[str], name: str, *, subfolder: str | None = None, **where: Any) -> Path | None:
    """One file of a folder or a Hub repository, `None` where it is not there; ValueError if that cannot be told."""
    if os.path.isdir(source):
        path = Path(source) / (subfolder or "") / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(str(source), name, subfolder=subfolder or None, **where))
    except EntryNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{quoted(str(source))} is neither a folder nor a Hub repository that can be read: {error}"
        ) from error


def refuse_pickled_adapter(source: str | PathLike[str], **place: Any) -> Path | None:
    """Where the configuration of a PEFT adapter is, if there is one; ValueError if its weights are not safetensors.

    PEFT and transformers unpickle an adapter's weights where there are no others, whatever they are told.
    """
    config = found_file(source, ADAPTER_CONFIG, **place)
    if config is not None and found_file(source, _ADAPTER_WEIGHTS, **place) is None:
        raise ValueError(
            f"There is no {_ADAPTER_WEIGHTS} beside {config}; weights of another format would have to be unpickled. "
            "If you trust them, load the adapter with PEFT and save it again."
        )
    return config


def refuse_code(kind: Any, source: str | PathLike[str], given: Mapping[str, Any], **place: Any) -> None:
    """ValueError if loading a model would unpickle weights, or fetch a kernel that only its configuration names.

    Args:
        kind: the model's class.
        source: folder or Hub repository of the model.
        given: the caller's arguments for `from_pretrained`.
        place: `subfolder`, `revision`, `token` and `cache_dir`.
    """
    adapter = refuse_pickled_adapter(source, **place)
    middle = f".{given['variant']}" if given.get("variant") else ""
    safe = (f"model{middle}.safetensors", f"model.safetensors.index{middle}.json")
    says_format = given.get("use_safetensors") is not None or given.get("gguf_file") is not None
    if not says_format and adapter is None and not any(found_file(source, name, **place) for name in safe):
        raise ValueError(
            f"There are no weights as safetensors ({' or '.join(safe)}) in {quoted(str(source))}, or it cannot be "
            "reached. Others are unpickled: if you trust them, load them with use_safetensors=False."
        )
    if "config" in given:
        return
    if adapter is not None and not (adapter.with_name("config.json").is_file() and os.path.isdir(source)):
        source = read_json_object(adapter).get("base_model_name_or_path") or source  # as transformers does
    config = kind.config_class.from_pretrained(source, **place)
    if asked := given.get("attn_implementation"):
        config._attn_implementation = asked
    wanted = set(asked.values()) if isinstance(asked, Mapping) else {asked}
    for name in _implementations(config):
        if isinstance(name, str) and "/" in name and name not in wanted:
            raise ValueError(
                f"The configuration in {quoted(str(source))} asks for the kernel {name!r}, which is code from "
                f"the Hub. If you trust it, ask for it yourself: attn_implementation={name!r}; if not, name another."
            )


def _implementations(config: PreTrainedConfig) -> Iterator[Any]:
    """The attention implementations of a configuration and of those inside it."""
    yield config._attn_implementation
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _implementations(value)
