"""The page of `selection.py`: its rows as tables, and the goals beside what was measured."""

import statistics
from collections.abc import Mapping
from typing import Any

from patchattn.evaluation.report.report import markdown_table

Row = Mapping[str, Any]
NOT_YET = "not measured yet"
# Key of a row, what is divided by what, the bound, and whether it is a least one.
GOALS = (
    ("decode/16384/quest, pages of 16, 10%", "quest", "grouped rows", 0.15, False),
    ("decode/16384/quest, pages of 64, 10%", "quest", "grouped rows", 0.15, False),
    ("model/8192/quest, pages of 64, 10%", "plain", "quest", 1.4, True),
    ("model/16384/quest, pages of 64, 10%", "plain", "quest", 2.2, True),
    ("prefill/2048/streaming", "sdpa", "streaming", 2.4, True),
    ("prefill/4096/streaming", "sdpa", "streaming", 3.6, True),
    ("prefill/8192/streaming", "sdpa", "streaming", 8.0, True),
    ("prefill/2048/streaming", "FlexAttention", "streaming", 1.0, True),
    ("prefill/4096/streaming", "FlexAttention", "streaming", 1.0, True),
    ("prefill/8192/streaming", "FlexAttention", "streaming", 1.0, True),
    ("lists/8192/shared lists, 25%", "lists", "sdpa", 0.5, False),
)


def written(rows: Mapping[str, Row]) -> str:
    """The whole page."""
    lines = [
        "# What reading fewer keys saves on a CPU",
        "",
        "`python benchmarks/selection.py decode`, `prefill`, `lists`, `model DIR`, then `page`; rows in "
        "`docs/results/selection/speed.jsonl`. What is compared takes turns in one process. Ratios are of medians and, "
        "in brackets, of minima: of attention alone, selector included, in the processor's time of one thread; `model` "
        "is of whole decoding steps by the clock. *Grouped rows* is dense attention with the query heads of a kv head "
        "as rows of one product, the baseline for one token; *buffered* is dense attention on a cache that appends in "
        "place, where plain transformers copies its cache at every token.",
        "",
        "## Goals",
        "",
        *goals(rows),
        "",
        "## All rows",
        "",
    ]
    lines += table(rows) if rows else [f"{NOT_YET.capitalize()}."]
    return "\n".join([*lines, "", *sorted({row["about"] for row in rows.values()})]).rstrip() + "\n"


def goals(rows: Mapping[str, Row]) -> list[str]:
    """Every goal, what was measured, and whether it is met."""
    found = []
    for key, of, over, bound, least in GOALS:
        kind, length, name = key.split("/")
        what = f"{kind}, {length}, {name}: {of} over {over}"
        wanted = f"at {'least' if least else 'most'} {bound:g}"
        times = rows[key]["ms"] if key in rows else {}
        if of not in times or over not in times:
            found.append([what, wanted, NOT_YET, ""])
            continue
        ratio = statistics.median(times[of]) / statistics.median(times[over])
        met = ratio >= bound if least else ratio <= bound
        found.append([what, wanted, f"{ratio:.2f}", "met" if met else "**missed**"])
    return markdown_table(["what", "goal", "measured", ""], found, texts=2)


def table(rows: Mapping[str, Row]) -> list[str]:
    """A line of each row: the last of its times is what all others are compared with."""
    lines = []
    for key, row in rows.items():
        kind, length, name = key.split("/")
        *others, own = row["ms"]
        beside = []
        for other in others:
            middle, least = (f(row["ms"][own]) / f(row["ms"][other]) for f in (statistics.median, min))
            beside.append(f"{middle:.2f} ({least:.2f}) of {other}")
        times = [f"{statistics.median(row['ms'][each]):.2f}" for each in (others[0], own)]
        lines.append([kind, name, length, f"{row['density']:.3f}", *times, ", ".join(beside)])
    head = ["what", "variant", "keys", "density", "first baseline, ms", "ms", "ratio"]
    return markdown_table(head, lines, texts=2)
