"""A board as a table and a page, from the rows that were measured."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...files.documents import laid_out
from ..report.report import markdown_table, number
from .measured import Measured, cost, difference, family, in_percent, partner, pooled
from .plan import DENSE
from .sentences import change, shown

BESIDE = "minus the row beside, points"
COLUMNS = ("prefill", "decode", "kv cache", "prompt density", "decode density", "parameters")


def board_table(rows: Mapping[str, Measured]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: of each row its scores, the mean difference to dense, its perplexity and what it costs.

    Rows are sorted by family, then by the mean difference, the best first; refused ones are left out.
    """
    with laid_out("the board"):
        dense = rows[DENSE]
        tasks = in_percent(dense)
        others = [name for name in dense["tasks"] if name not in tasks]
        head = ["row", "family", "minus dense, points", *tasks]
        if any(map(partner, rows.values())):
            head.insert(3, BESIDE)
        head += [f"{name}, minus dense" for name in others] + list(COLUMNS)
        kept = [(name, row) for name, row in rows.items() if "refused" not in row]
        lines = []
        for name, row in sorted(kept, key=lambda item: _order(item[0], item[1], tasks)):
            line = _line(name, row, tasks, others, dense)
            if BESIDE in head:
                other, mean = partner(row), pooled(row, tasks, beside=True)
                line.insert(3, "" if other is None or mean is None else f"{change(mean)} ({other})")
            lines.append(line)
        return head, lines


def board_page(
    rows: Mapping[str, Measured], pictures: Sequence[tuple[str, str]] = (), missing: Iterable[str] = (), how: str = ""
) -> str:
    """The page of a board, as Markdown; its table is sorted by a click where the site has a script for it.

    Args:
        rows: of `read_rows`.
        pictures: title and file, beside the page, of each.
        missing: names of rows that were not measured.
        how: the command that they were measured by.
    """
    dense = rows[DENSE]
    tasks = in_percent(dense)
    head, lines = board_table(rows)
    samples = [f"{name} {task['samples']}" for name, task in dense["tasks"].items()]
    text = [
        "# The board",
        "",
        f"One model under every row, on the same work: {_conditions(dense)}",
        f"Samples: {', '.join(samples)}.",
        *(["", "```bash", how, "```"] if how else []),
        "",
        "Scores are compared with the unpatched model's on the same samples; ± is the standard error of the "
        "difference, and a difference below twice that shows nothing. *minus dense* is the mean over the tasks scored "
        "in percent. *= dense* stands where a row acts behind a prompt alone and a task generates nothing: it gives "
        "what dense gives by construction. *prefill* and *decode* are how many times as fast as the unpatched model it "
        "is, in turn with it in one run, with the least and the greatest of the turns; - is not timed yet. *kv cache* "
        "is what caches hold for each byte of all keys and values, *density* the share of keys read.",
        *_beside(rows),
        "",
        *(line for title, name in pictures for line in (f"![{title}]({name})", "")),
        '<div class="sortable" markdown="1">',
        "",
        *markdown_table(head, lines, texts=2),
        "",
        "</div>",
        "",
        "## What was shown",
        "",
        "| row | what it is | shown | measured |",
        "|---|---|---|---|",
    ]
    for name, row in sorted(rows.items(), key=lambda item: _order(item[0], item[1], tasks)):
        what = "the unpatched model" if name == DENSE else row["measured"]["row"]["about"]
        text.append(f"| {name} | {what} | {shown(name, row, dense)} | {_when(row)} |")
    if refusals := _refusals(rows):
        text += ["", "## Refused", "", *refusals]
    if missing := sorted(missing):
        text += ["", f"Not run yet: {', '.join(missing)}."]
    return "\n".join(text) + "\n"


def _conditions(dense: Measured) -> str:
    device, model = dense["device"], dense["model"]
    versions = ", ".join(f"{name} {value}" for name, value in dense["versions"].items())
    return (
        f"{model['name']} ({model['class']}), {model['dtype']}, {model['attention']} attention, on {device['name']} "
        f"({device['type']}), {device['threads']} thread{'s' if device['threads'] != 1 else ''}; {versions}."
    )


def _beside(rows: Mapping[str, Measured]) -> list[str]:
    if not any(map(partner, rows.values())):
        return []
    return [
        "",
        f"*{BESIDE.removesuffix(', points')}* is the same mean against the row in brackets, on the same samples: for "
        "what was tuned under a variant, the unpatched model that was tuned alike. LoRA adapters merge into the "
        "weights: they are not counted as parameters, and times are without them.",
    ]


def _when(row: Measured) -> str:
    times = row["speed"]
    given = [row["date"], (row.get("commit") or "")[:8], "" if times is None else f"timed {times['date']}"]
    return ", ".join(filter(None, given))


def _refusals(rows: Mapping[str, Measured]) -> list[str]:
    """The reason of each refusal once, with all rows that it is true of."""
    found: dict[str, list[str]] = {}
    for name, row in rows.items():
        for task, given in row.get("tasks", {}).items():
            if "refused" in given:
                found.setdefault(f"{task}: {given['refused']}", []).append(name)
        if row["speed"] is not None and "refused" in row["speed"]:
            found.setdefault(f"times: {row['speed']['refused']}", []).append(name)
    return [f"- {', '.join(names)}; {reason}" for reason, names in found.items()]


def _order(name: str, row: Measured, tasks: Sequence[str]) -> tuple[Any, ...]:
    if name == DENSE:
        return (0,)
    if "refused" in row:
        return 2, name
    mean = pooled(row, tasks)
    return 1, family(row), math.inf if mean is None else -mean.mean, name


def _line(name: str, row: Measured, tasks: Sequence[str], others: Sequence[str], dense: Measured) -> list[str]:
    is_dense = name == DENSE
    mean = None if is_dense else pooled(row, tasks)
    cells = [name, family(row), "" if mean is None else change(mean), *(_score(row["tasks"][task]) for task in tasks)]
    for task in others:
        found = None if is_dense else difference(row, task)
        cells.append(
            _score(row["tasks"][task]) if found is None or row["tasks"][task].get("as_dense") else change(found)
        )
    cells += ["1", "1"] if is_dense else [_speed(row, key) for key in ("prefill", "decode")]
    for key in ("kv cache", "prompt density", "decode density"):
        value = cost(row, key, dense)
        cells.append("" if value is None else number(value))
    added = row["parameters"] - dense["parameters"]
    return [*cells, f"{row['parameters']:,}" if is_dense else f"{added:+,}"]


def _score(found: Measured) -> str:
    if "refused" in found:
        return "refused"
    return "= dense" if found.get("as_dense") else number(found["score"])


def _speed(row: Measured, key: str) -> str:
    if row["speed"] is None:
        return "-"
    if "refused" in row["speed"]:
        return "refused"
    if row["speed"].get("as_dense"):
        return "= dense"
    ratio = row["speed"]["ratio"][key]
    return f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['greatest']:.2f})"
