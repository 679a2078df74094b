"""Records with named fields from files: questions and answers, prompts, answers to a context."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files.documents import json_lines, quoted, read_text
from .data import tsv_records


def read_records(path: str | Path, needed: Sequence[str], optional: Sequence[str] = ()) -> list[dict[str, str]]:
    """The records of a file, each with the texts of some fields; optional ones are empty where they are not there.

    Args:
        path: `.jsonl`: a JSON object a line. `.tsv`: tab-separated lines below a header.
        needed: names of fields.
        optional: likewise.

    Raises:
        ValueError: no such file, neither of these kinds, no record, or one that lacks a field or has another one; the
            message says which line.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".tsv"):
        raise ValueError(f"{path}: expected a file of the kinds .jsonl, .tsv.")
    if not path.is_file():
        raise ValueError(f"There is no file {str(path)!r}.")
    content = read_text(path, encoding="utf-8-sig")
    is_json = path.suffix == ".jsonl"
    rows = json_lines(content, path, skip_empty=True) if is_json else tsv_records(path, content)
    found = [_checked(path, number, row, needed, optional) for number, row in rows]
    if not found:
        raise ValueError(f"{path} holds no record.")
    return found


def _checked(path: Path, number: int, row: Any, needed: Sequence[str], optional: Sequence[str]) -> dict[str, str]:
    names = (*needed, *optional)
    if not isinstance(row, Mapping) or not set(needed) <= set(row) <= set(names):
        told = f"the fields {', '.join(needed)}" + (f", and may have {', '.join(optional)}" if optional else "")
        raise ValueError(f"{path}, line {number}: a record has {told}; got {quoted(row)}.")
    texts = {
        name: str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        for name, value in row.items()
    }
    if wrong := [name for name, value in texts.items() if not isinstance(value, str)]:
        raise ValueError(f"{path}, line {number}: {wrong[0]} is a text, got {quoted(row[wrong[0]])}.")
    return {name: texts.get(name, "") for name in names}
