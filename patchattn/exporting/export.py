"""A patched model as a plain transformers checkpoint, for whoever does not know us."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn

from ..checking.coverage.inputs import guesses
from ..checking.forwards import TOLERANCE, difference, first_output, inputs_for
from ..core.patching import active_chains
from ..core.selection import base_model, evaluating
from ..files.documents import quoted
from ..files.folders import replacing
from .plain import plain_model

# Of a model's folder, what makes its inputs: files of these kinds, but for those with these names.
_KINDS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".bpe", ".vocab")
_OTHERS = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "patchattn_config.json",
    "trainer_state.json",
)


def export(
    model: nn.Module,
    directory: str | PathLike[str],
    *,
    processor: Any = "auto",
    inputs: Mapping[str, Any] | torch.Tensor | None = None,
    max_shard_size: str = "50GB",
) -> float:
    """Write a plain transformers checkpoint that computes what a patched model computes, and loads without patchattn.

    The patch is said in the model's own configuration and weights: heads and channels that were taken out evenly,
    merged kv heads, biases where the class has them, and factors of heads. It is written only if the model that
    transformers loads from it gives the same outputs as the patched one, within what its dtype allows (1e-8 of the
    largest output in float64, 1e-4 in float32, 1e-2 in float16, 5e-2 in bfloat16). Generation settings are written
    along.

    Args:
        model: a patched model, on one device. It stays as it is.
        directory: must be empty or not exist. After an error it is as it was.
        processor: the model's tokenizer or processor, to be saved along. `"auto"`: the files of one that lie where the
            model was loaded from, a folder or a Hub repository; `None`: nothing.
        inputs: keyword arguments of a forward, or input ids `(B, T)`, that are to give equal outputs and must reach
            every patched attention module; random ones by default.
        max_shard_size: of a file of weights.

    Returns:
        The largest difference between the outputs, as a part of the largest output.

    Raises:
        ValueError: the model is not patched, carries adapters, has weights elsewhere or without values; the folder is
            not empty; inputs are needed, or the outputs differ.
        NotImplementedError: the patch cannot be said in a plain model; the message says what can.
        TypeError: `model` is not a transformers model, or a processor cannot be saved.
        OSError: the folder cannot be written.
    """
    base: Any = base_model(model)
    folder = Path(directory)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: export into a new folder.")
    if not (processor is None or processor == "auto" or hasattr(processor, "save_pretrained")):
        raise TypeError(f"processor must have save_pretrained, as tokenizers do; got {type(processor).__name__}.")
    plain = plain_model(base)
    with _nothing_left(folder), evaluating(base), torch.no_grad():
        given, expected = _expected(base, inputs)
        source = _files_of(base.config._name_or_path) if processor == "auto" else None
        with replacing(folder) as files:
            plain.save_pretrained(files, max_shard_size=max_shard_size)
            error = _compare(base, files, given, expected)
            if source is not None:
                _copy(source, files)
            elif processor is not None and processor != "auto":
                processor.save_pretrained(files)
    return error


def _compare(base: Any, files: Path, given: Mapping[str, Any], expected: torch.Tensor) -> float:
    """How far the model in a folder is from the patched one; ValueError if it is too far."""
    loaded, report = type(base).from_pretrained(
        files,
        dtype=base.dtype,
        attn_implementation=base.config._attn_implementation,
        output_loading_info=True,
        local_files_only=True,
    )
    wrong = {key: sorted(map(str, names)) for key, names in report.items() if names}
    error = difference(first_output(loaded.to(base.device).eval(), given), expected)
    allowed = TOLERANCE.get(base.dtype, 1e-4)
    if wrong or not error <= allowed:
        raise ValueError(
            f"The plain {type(base).__name__} differs from the patched one by {error:.1e} of the largest output, where "
            f"{allowed:.0e} is allowed{f', and did not load whole: {wrong}' if wrong else ''}. It was not written."
        )
    return error


def _expected(base: Any, inputs: Mapping[str, Any] | torch.Tensor | None) -> tuple[Mapping[str, Any], torch.Tensor]:
    """Inputs that reach every patched attention module, and what the patched model makes of them."""
    names = list(active_chains(base))
    left = names
    failed: Exception | None = None
    for given in [inputs_for(base, inputs)] if inputs is not None else _tried(base):
        reached: set[str] = set()
        handles = [base.get_submodule(name).register_forward_hook(partial(_note, reached, name)) for name in names]
        try:
            output = first_output(base, given)
        except Exception as error:  # a guess may be wrong in any way; the last one's error is shown if none fits
            if inputs is not None:
                raise
            failed = error
            continue
        finally:
            for handle in handles:
                handle.remove()
        left = [name for name in names if name not in reached]
        if not left:
            return given, output
    raise ValueError(
        f"{type(base).__name__} was not run through {left[0]}{' and others' if len(left) > 1 else ''}, so that nothing "
        "shows that the plain model is equal: give inputs=... that reach every patched module."
    ) from failed


def _note(reached: set[str], name: str, *_: Any) -> None:
    reached.add(name)


def _tried(base: Any) -> Iterator[Mapping[str, Any]]:
    with suppress(ValueError):
        yield inputs_for(base, None)
    for given in guesses(base):
        yield inputs_for(base, given)


def _files_of(source: str) -> Path | None:
    """The folder with the tokenizer's and the processor's files; `None` of a model that was loaded from nowhere."""
    if not source or os.path.isdir(source):
        return Path(source) if source else None
    try:
        return Path(snapshot_download(source, allow_patterns=[f"*{kind}" for kind in _KINDS]))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The tokenizer or processor of {quoted(source)}, where this model came from, cannot be read "
            f"({str(error)[:200]}): hand it over as processor=..., or give processor=None to leave it out."
        ) from error


def _copy(source: Path, files: Path) -> None:
    for path in sorted(source.iterdir()):
        wanted = path.suffix in _KINDS and path.name not in _OTHERS and not path.name.endswith(".index.json")
        if path.is_file() and wanted and not (files / path.name).exists():
            shutil.copyfile(path, files / path.name)


@contextmanager
def _nothing_left(folder: Path) -> Iterator[None]:
    """After an error, take away the folders that were made on the way to this one."""
    made: list[Path] = []
    for each in (folder, *folder.parents):
        if each.exists():
            break
        made.append(each)
    try:
        yield
    except BaseException:
        for each in made:
            with suppress(OSError):
                each.rmdir()
        raise
