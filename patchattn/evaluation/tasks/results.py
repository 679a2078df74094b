"""Results files, one JSON object per line, that a killed run continues and a different run does not."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...core.info import patch_info
from ...files.documents import as_json, decoded, parse_json, quoted, read_json_object, write_json


def model_identity(model: Any) -> dict[str, Any]:
    """What says which model answers, and patched how; weights are not looked at."""
    generation = getattr(model, "generation_config", None)
    return {
        "model": model.config.name_or_path,
        "class": type(model).__name__,
        "dtype": str(model.dtype),
        "attention": model.config._attn_implementation,
        "patches": patch_info(model)["patches"],
        "generation_config": None if generation is None else generation.to_diff_dict(),
    }


def claim(path: Path, made_with: Mapping[str, Any], *, write: bool = True) -> None:
    """Note beside a results file what this run is made with, or check that it is what the file was begun with.

    Args:
        path: the results file, or a folder of them; the note is `<path>.settings.json`.
        made_with: what must not change between the starts of one run, such as settings and a digest of what is asked.
        write: whether to make the note; of several processes, one does.

    Raises:
        ValueError: the file holds another run, the message names what differs; or the note is missing.
    """
    now = as_json(made_with)
    beside = path.with_name(f"{path.name}.settings.json")
    if not beside.is_file():
        if path.exists():
            raise ValueError(f"{path} has no {beside.name}; choose another output.")
        if not write:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(beside, now)
        return
    before = read_json_object(beside)
    if keys := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
        changes = "; ".join(f"{key}: {quoted(before.get(key))} became {quoted(now.get(key))}" for key in keys)
        raise ValueError(f"{path} holds a run with other settings ({changes}). Choose another output.")


def read_done(path: Path, requests: Sequence[Mapping[str, Any]], key: str) -> list[dict[str, Any]]:
    """The rows that are there; a last line that a kill cut off is cut off the file too.

    Args:
        path: the results file, which need not exist.
        requests: what each row says of its request, in order.
        key: of the answer in a row.

    Raises:
        ValueError: a row that is none, answers another request, or is one too many.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    lines = decoded(whole, path).split("\n")[:-1]  # answers may hold breaks that splitlines() takes for ends of lines
    if len(lines) > len(requests):
        raise ValueError(f"{path} holds {len(lines)} answers to {len(requests)} requests; choose another output.")
    done: list[dict[str, Any]] = []
    for number, (line, request) in enumerate(zip(lines, requests, strict=False), 1):
        try:
            row = parse_json(line, path, line=number)
        except ValueError:
            row = None
        if not isinstance(row, dict) or key not in row:
            raise ValueError(f"{path}, line {number}: not an answer of such a run. Choose another output.")
        wanted = as_json(dict(request))
        if {name: row[name] for name in wanted if name in row} != wanted:
            raise ValueError(f"{path}, line {number}: the answer to another request. Choose another output.")
        done.append(row)
    return done
