"""Patched models inside those of the sentence-transformers library."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..files.documents import quoted, read_json
from ..files.untrusted import found_file
from .checkpoint import from_pretrained
from .whole_model import saved_plan

_MODULES = "modules.json"


def load_sentence_transformer(
    source: str | PathLike[str],
    kind: Any = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_folder: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Load what sentence-transformers saved from a patched model, patch included.

    The library's own loading leaves the patch out, and cannot load pruned weights.

    Args:
        source: folder or Hub repository that `save` or `push_to_hub` of the patched model wrote.
        kind: class to load, such as `CrossEncoder`; by default `SentenceTransformer`.
        revision: of the Hub repository: a branch, tag or commit.
        token: for a private repository.
        cache_folder: where downloads are kept.
        model_kwargs: for the `from_pretrained` of the transformers model: `dtype`, `attn_implementation`, ...
        kwargs: for `kind`, such as `device`.

    Returns:
        The model, whose transformers model is patched.

    Raises:
        ValueError: nothing there is patched, or as `patchattn.from_pretrained`.
        ImportError: sentence-transformers is not installed.

    Examples:
        ```python
        model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        patchattn.patch_model(model, "prune", sparsity=0.25, importance="magnitude")
        model.save("pruned")
        model = patchattn.load_sentence_transformer("pruned")
        ```
    """
    if kind is None:
        from sentence_transformers import SentenceTransformer

        kind = SentenceTransformer
    given = {"use_safetensors": True, **(model_kwargs or {})}
    place: dict[str, Any] = {"revision": revision or "main", "token": token, "cache_dir": cache_folder}
    patched = {}
    for name, subfolder in _modules(source, place):
        inside = {**place, "subfolder": subfolder} if subfolder else place
        if saved_plan(source, variant=given.get("variant"), **inside) is not None:
            patched[name] = from_pretrained(source, **inside, **given)
    if not patched:
        raise ValueError(
            f"{quoted(str(source))} holds no patched model that sentence-transformers saved: load it with that library."
        )
    given["ignore_mismatched_sizes"] = True  # of pruned weights; the patched model takes the place of what comes of it
    with _without_report():
        model = kind(
            str(source), revision=revision, token=token, cache_folder=cache_folder, model_kwargs=given, **kwargs
        )
    for name, inner in patched.items():
        _exchange(model.get_submodule(name), inner)
    return model


def _modules(source: str | PathLike[str], place: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and folder of every module that sentence-transformers saved; it writes a transformers model into one."""
    path = found_file(source, _MODULES, **place)
    entries = [] if path is None else read_json(path)
    for entry in entries if isinstance(entries, list) else [entries]:
        name, folder = (entry.get(key) for key in ("name", "path")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(folder, str):
            raise ValueError(f"{path}: expected a list of modules with name and path, got {quoted(json.dumps(entry))}.")
        yield name, folder


def _exchange(module: nn.Module, patched: PreTrainedModel) -> None:
    """Put a patched model in the place of the transformers model inside a module, on its device."""
    found = next((name for name, inner in module.named_modules() if isinstance(inner, PreTrainedModel)), None)
    if not found:
        raise ValueError(f"{type(module).__name__} holds no transformers model, where a patched one was saved.")
    plain: Any = module.get_submodule(found)
    if type(plain) is not type(patched):
        raise ValueError(
            f"A patched {type(patched).__name__} was saved where sentence-transformers loads a {type(plain).__name__}."
        )
    if getattr(patched, "hf_device_map", None) is None:
        patched.to(plain.device)
    parent, _, child = found.rpartition(".")
    setattr(module.get_submodule(parent), child, patched.train(plain.training))


@contextmanager
def _without_report() -> Iterator[None]:
    """Leave out what transformers logs of weights that do not fit; they are not used."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
