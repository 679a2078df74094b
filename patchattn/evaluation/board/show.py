"""A board as a table and a picture, from the rows that were measured."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files.documents import laid_out, read_json_object
from ...plotting.pareto import ParetoPoint, plot_pareto
from ..report.report import markdown_table, number
from .plan import DENSE
from .run import ROWS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Measured = Mapping[str, Any]
COSTS = {"kv cache": "kv cache, share of all keys", "density": "share of keys read", "decode": "decoding, dense = 1"}


def read_rows(output: Path) -> dict[str, Measured]:
    """Name of each measured row to what its file holds, dense first.

    Raises:
        ValueError: no rows, none of them dense, or a damaged file.
    """
    found = {path.stem: read_json_object(path) for path in sorted((output / ROWS).glob("*.json"))}
    if DENSE not in found:
        raise ValueError(f"{output} holds no board with a row {DENSE!r}: run `patchattn board run` first.")
    return {DENSE: found.pop(DENSE), **found}


def pooled(row: Measured) -> tuple[float, float] | None:
    """Mean of the differences to dense over the tasks scored in percent, and its standard error; None for none."""
    shares = [task for task in row["tasks"].values() if task.get("unit") == "%" and task.get("difference") is not None]
    if not shares:
        return None
    errors = [task["difference_error"] or 0.0 for task in shares]
    mean = sum(task["difference"] for task in shares) / len(shares)
    return mean, math.sqrt(sum(error**2 for error in errors)) / len(shares)


def board_table(rows: Mapping[str, Measured]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: of each row its scores, the mean difference to dense, its perplexity and what it costs.

    Rows are sorted by family, then by the mean difference, the best first; refused ones come last.
    """
    with laid_out("the board"):
        tasks = [name for name, task in rows[DENSE]["tasks"].items() if task["unit"] == "%"]
        others = [name for name, task in rows[DENSE]["tasks"].items() if task["unit"] != "%"]
        head = ["row", "family", "minus dense, points", *tasks]
        head += [f"{name}, minus dense" for name in others]
        head += ["prefill", "decode", "kv cache", "density", "parameters"]
        kept = [(name, row) for name, row in rows.items() if "refused" not in row]
        return head, [_line(name, row, tasks, others, rows[DENSE]) for name, row in sorted(kept, key=_order)]


def board_page(rows: Mapping[str, Measured], picture: str | None = None) -> str:
    """The page of a board, as Markdown.

    Args:
        rows: of `read_rows`.
        picture: name of the picture's file beside the page.
    """
    dense = rows[DENSE]
    device, model = dense["device"], dense["model"]
    about = (
        f"{model['class']}, {model['dtype']}, {model['attention']} attention, on {device['name']} ({device['type']}), "
        f"{device['threads']} threads; {', '.join(f'{name} {value}' for name, value in dense['versions'].items())}."
    )
    samples = ", ".join(f"{name} {task['samples']}" for name, task in dense["tasks"].items())
    lines = [
        "# The board",
        "",
        f"One model under every row, on the same work: {about}",
        f"Samples: {samples}.",
        "",
        "Scores are compared with the unpatched model's on the same samples; ± is the standard error of the "
        "difference, and a difference below twice that shows nothing. *minus dense* is the mean over the tasks scored "
        "in percent. Times are ratios to the unpatched model's, taken in turn with it in one run, above 1 is faster; "
        "*kv cache* is what caches hold for each byte of all keys and values, *density* the share of keys read.",
        "",
        *([f"![Mean difference to dense over the cache's size]({picture})", ""] if picture else []),
        *markdown_table(*board_table(rows), texts=2),
        "",
        "| row | what it is | measured |",
        "|---|---|---|",
    ]
    for name, row in rows.items():
        what = "the unpatched model" if name == DENSE else row["measured"]["row"]["about"]
        commit = (row.get("commit") or "")[:8]
        lines.append(f"| {name} | {what} | {row['date']}{f', {commit}' if commit else ''} |")
    refused = [(name, "the model", row["refused"]) for name, row in rows.items() if "refused" in row] + [
        (name, task, found["refused"])
        for name, row in rows.items()
        for task, found in row.get("tasks", {}).items()
        if "refused" in found
    ]
    if refused:
        lines += ["", "Not measured, since it is refused:", ""]
        lines += [f"- {name}, {what}: {reason}" for name, what, reason in refused]
    return "\n".join(lines) + "\n"


def board_picture(rows: Mapping[str, Measured], cost: str = "kv cache") -> "Figure":
    """Mean difference to dense over a cost.

    Args:
        rows: of `read_rows`.
        cost: a key of `COSTS`.

    Raises:
        ValueError: fewer than two rows have that cost.
    """
    points = [ParetoPoint(DENSE, 0.0, 1.0)]
    for name, row in rows.items():
        mean = None if name == DENSE or "refused" in row else pooled(row)
        value = None if mean is None else _cost(row, cost)
        if mean is not None and value is not None:
            points.append(ParetoPoint(name, mean[0], value))
    if len(points) < 2:
        raise ValueError(f"No row of the board has the cost {cost!r}.")
    return plot_pareto(
        points,
        score="minus dense, mean of tasks, points",
        cost=COSTS[cost],
        lower_cost_is_better=cost != "decode",
        title="What is lost, and what is saved",
    )


def _order(item: tuple[str, Measured]) -> tuple[Any, ...]:
    name, row = item
    if name == DENSE:
        return (0,)
    mean = pooled(row)
    return 1, row["measured"]["row"]["family"], math.inf if mean is None else -mean[0], name


def _line(name: str, row: Measured, tasks: Sequence[str], others: Sequence[str], dense: Measured) -> list[str]:
    is_dense = name == DENSE
    mean = None if is_dense else pooled(row)
    cells = [name, "" if is_dense else row["measured"]["row"]["family"], "" if mean is None else _change(*mean)]
    cells += [_score(row["tasks"][task]) for task in tasks]
    for task in others:
        found = row["tasks"][task]
        if is_dense or "refused" in found:
            cells.append(_score(found))
        else:
            cells.append(_change(found["difference"], found["difference_error"]))
    speed = [1.0, 1.0] if is_dense else [row["speed"]["ratio"][key] for key in ("prefill", "decode")]
    cells += [number(value) for value in speed]
    cells += ["" if value is None else number(value) for value in (_cost(row, "kv cache"), _cost(row, "density"))]
    added = row["parameters"] - dense["parameters"]
    return [*cells, f"{row['parameters']:,}" if is_dense else f"{added:+,}"]


def _score(found: Measured) -> str:
    return "refused" if "refused" in found else number(found["score"])


def _change(difference: float | None, error: float | None) -> str:
    text = number(difference, sign=True)
    return text if error is None else f"{text} ± {number(error)}"


def _cost(row: Measured, cost: str) -> float | None:
    if cost == "density":
        return row["density"]
    if cost == "decode":
        return row["speed"]["ratio"]["decode"] if row["speed"] else 1.0
    known = [ratio for task in row["tasks"].values() if (ratio := task.get("cache_ratio")) is not None]
    return sum(known) / len(known) if known else None
