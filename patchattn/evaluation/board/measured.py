"""The rows of a board that were measured, and what they say together."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...files.documents import read_json_object
from .plan import DENSE
from .run import ROWS, SPEED

Measured = Mapping[str, Any]
COSTS = {
    "kv cache": "kv cache, share of all keys and values",
    "prompt density": "keys read of a prompt, share",
    "decode density": "keys read while decoding, share",
    "parameters": "parameters, dense = 1",
    "decode": "decoding, dense = 1",
}


class Difference(NamedTuple):
    """Of a score to dense's on the same samples.

    Attributes:
        mean: the difference.
        error: its standard error; None where it cannot be stated.
    """

    mean: float
    error: float | None

    @property
    def is_shown(self) -> bool:
        """Whether it is more than twice its error."""
        return self.error is not None and abs(self.mean) > 2 * self.error


def read_rows(output: Path) -> dict[str, Measured]:
    """Name of each measured row to what its file holds, and `speed`, what that of its times does; dense first.

    Raises:
        ValueError: no rows, none of them dense, a damaged file, or times of another row than what was scored.
    """
    found: dict[str, Measured] = {}
    for path in sorted((output / ROWS).glob("*.json")):
        times, row = output / SPEED / path.name, read_json_object(path)
        speed = read_json_object(times) if times.is_file() else None
        if speed is not None and _said(speed) != _said(row):
            raise ValueError(
                f"{times} is of another row than {path}: of other settings, or of a patch that was saved anew. Remove "
                "one of them, and run the row again."
            )
        found[path.stem] = {**row, "speed": speed}
    if DENSE not in found:
        raise ValueError(f"{output} holds no board with a row {DENSE!r}: run `patchattn board run` first.")
    return {DENSE: found.pop(DENSE), **found}


def _said(file: dict[str, Any]) -> Any:
    """Of the file of a row or of its times: what the row is, with the digest of its patch."""
    return (file.get("measured") or {}).get("row")


def difference(row: Measured, task: str, *, beside: bool = False) -> Difference | None:
    """Of one task; zero where a row gives what dense does by construction, None where it was not scored.

    Args:
        row: of `read_rows`.
        task: its name.
        beside: to the row that this one is beside, instead of to dense.
    """
    found = row["tasks"][task]
    if beside:
        found = found.get("beside", {})
    if found.get("as_dense"):
        return Difference(0.0, 0.0)
    if found.get("difference") is None:
        return None
    return Difference(found["difference"], found["difference_error"])


def pooled(row: Measured, tasks: Sequence[str], *, beside: bool = False) -> Difference | None:
    """Mean of the differences over those of these tasks that were scored; None for none."""
    given = [found for task in tasks if (found := difference(row, task, beside=beside)) is not None]
    if not given:
        return None
    mean = sum(found.mean for found in given) / len(given)
    return Difference(mean, math.sqrt(sum((found.error or 0.0) ** 2 for found in given)) / len(given))


def in_percent(dense: Measured) -> list[str]:
    """The tasks that are scored in percent."""
    return [name for name, task in dense["tasks"].items() if task["unit"] == "%"]


def family(row: Measured) -> str:
    """What a row is to be compared with; of dense nothing."""
    about = row["measured"]["row"]
    return "" if about is None else str(about["family"])


def partner(row: Measured) -> str | None:
    """Name of the row that one is beside, if any."""
    name: str | None = (row["measured"]["row"] or {}).get("beside")
    return name


def cost(row: Measured, name: str, dense: Measured) -> float | None:
    """What a row costs: a key of `COSTS`; None where that was not measured, or the row does not say it."""
    if "refused" in row:
        return None
    if name == "kv cache":
        known = [ratio for task in row["tasks"].values() if (ratio := task.get("cache_ratio")) is not None]
        return sum(known) / len(known) if known else None
    if name.endswith("density"):
        share: float | None = row["density"].get(name.split()[0])
        return share
    if name == "parameters":
        return float(row["parameters"] / dense["parameters"])
    speed = row["speed"]
    if speed is None or "refused" in speed:
        return None
    return 1.0 if speed.get("as_dense") else float(speed["ratio"][name]["median"])
