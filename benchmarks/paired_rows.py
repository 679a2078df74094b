"""Rows of results in a file, which a run that was stopped goes on from, and differences of what is told of pairs."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_lines(path: Path) -> list[tuple[str, Row]]:
    """Keys and rows in their order; a line that was cut off is none."""
    lines = path.read_text("utf-8").split("\n")[:-1] if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return [(row.pop("key"), row) for row in rows]


def read_rows(path: Path) -> dict[str, Row]:
    """The rows that are there, by key, the last of each."""
    return dict(read_lines(path))


def append_row(path: Path, key: str, row: Row) -> None:
    """Write a row behind whole lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.read_bytes() if path.exists() else b""
    if old and not old.endswith(b"\n"):
        path.write_bytes(old[: old.rfind(b"\n") + 1])
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"key": key, **row}) + "\n")


def paired(found: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Mean difference and its standard error, NaN for fewer than two pairs."""
    differences = [a - b for a, b in zip(found, other, strict=True)]
    if len(differences) < 2:
        return (differences[0] if differences else math.nan), math.nan
    return statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
