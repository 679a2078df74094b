"""Rows of results: of each prompt what methods made of it, in a file to which later runs append."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from paired_rows import append_row, paired, read_lines

Outcomes = dict[str, list[float]]
DIGITS = 4


def read(path: Path) -> dict[str, Outcomes]:
    """By prompt, then by method and settings; lines of one prompt are put together."""
    found: dict[str, Outcomes] = {}
    for key, row in read_lines(path):
        found.setdefault(key, {}).update(row["found"])
    return found


def append(path: Path, key: str, outcomes: Mapping[str, Sequence[float]]) -> None:
    """Write what was found of a prompt."""
    rounded = {name: [round(value, DIGITS) for value in values] for name, values in outcomes.items()}
    append_row(path, key, {"found": json.loads(json.dumps(rounded))})


def differences(rows: Mapping[str, Outcomes], name: str, other: str, place: int) -> tuple[int, float, float, float]:
    """Pairs, mean of the one, mean difference to the other, and its standard error.

    Args:
        rows: of prompts.
        name: the one.
        other: what it is compared with.
        place: of the number in its outcomes.
    """
    both = [(found[name][place], found[other][place]) for found in rows.values() if name in found and other in found]
    if not both:
        return 0, math.nan, math.nan, math.nan
    ours, theirs = zip(*both, strict=True)
    return len(both), sum(ours) / len(both), *paired(ours, theirs)
