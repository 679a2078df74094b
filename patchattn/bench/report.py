"""Results as Markdown."""

from collections.abc import Iterator, Sequence

from .goals import judged
from .result import Result
from .results import Report

OPERATIONS = {
    "routed": "Routed attention (MoH)",
    "act": "ACT on one call of attention",
    "block_sparse": "Heads with sinks and recent keys",
    "selected": "Selected pages, decoding",
    "split": "Attention with a set of keys told apart",
    "column_mass": "Mass of columns",
    "temperature": "Inverse temperatures",
    "moh_attention": "MoH: an attention layer with its projections",
    "moh_layer": "MoH: a whole layer",
    "act_attention": "ACT: an attention layer with its projections",
    "act_layer": "ACT: a whole layer",
}


def to_markdown(report: Report) -> str:
    """All tables of a report."""
    machine = report.machine
    facts = ", ".join(f"{key} {machine[key]}" for key in machine if key not in ("date", "command", "device"))
    lines = ["# Benchmark", "", f"{machine['date']}, {machine['device']}: {facts}.", "", f"`{machine['command']}`", ""]
    if report.ceilings is not None:
        products = ", ".join(f"{rate / 1e12:.4g} TFLOP/s in {name}" for name, rate in report.ceilings.products.items())
        lines += [
            f"Measured ceilings of the device: a copy moves {report.ceilings.copy / 1e9:.4g} GB/s (read and written), "
            f"products of random matrices {products}.",
            "",
        ]
    lines += ["## Goals", "", *goal_table(report.results), ""]
    if report.conditions:
        lines += ["## Clocks, power and temperature", "", *condition_table(report.conditions), ""]
    for op, title in OPERATIONS.items():
        rows = [row for row in report.results if row.case.op == op]
        if rows:
            lines += [f"## {title}", "", *result_table(rows), ""]
    return "\n".join(lines)


def goal_table(results: Sequence[Result]) -> Iterator[str]:
    """Goals for an H200 in bfloat16, beside what was measured."""
    yield "| goal (H200, bfloat16) | wanted | measured | |"
    yield "|---|---|---|---|"
    for verdict in judged(results):
        measured = "not measured" if verdict.measured is None else f"{verdict.measured:.3g}"
        word = verdict.reason if verdict.met is None else "met" if verdict.met else "**not met**"
        yield f"| {verdict.goal} | {verdict.wanted} | {measured} | {'' if word == 'not measured' else word} |"


def condition_table(rows: Sequence[dict[str, str]]) -> Iterator[str]:
    """What `nvidia-smi` told when cases began and ended."""
    yield f"| {' | '.join(rows[0])} |"
    yield "|" + "---|" * len(rows[0])
    for row in rows:
        yield f"| {' | '.join(row.values())} |"


def result_table(rows: Sequence[Result]) -> Iterator[str]:
    """Rows of one operation, case by case."""
    yield (
        "| case | implementation | ms, median (quartiles) | x flash | useful TFLOP/s | share of ceiling | peak MiB | "
        "error (torch's) | |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        flash = next((r.seconds for r in rows if r.case == row.case and r.implementation == "SDPA flash"), None)
        yield f"| {row.case.name} | {row.implementation} | " + " | ".join(_cells(row, flash)) + " |"


def _cells(row: Result, flash: float | None) -> Iterator[str]:
    graph = "" if row.graph_seconds is None else f"{row.graph_seconds * 1e3:.4g} ms in a CUDA graph"
    notes = [row.kernel, row.dtype, "CUDA graph" if row.graphed else graph]
    if row.seconds is None or row.low is None or row.high is None:
        yield from [row.status, "", "", "", ""]
    else:
        yield f"{row.seconds * 1e3:.4g} ({row.low * 1e3:.4g} to {row.high * 1e3:.4g})"
        yield "" if flash is None else f"{flash / row.seconds:.2f}"
        yield f"{row.useful_tflops:.4g}"
        yield f"{row.share_of_ceiling:.1%}"
        yield "not measured" if row.peak_memory is None else f"{row.peak_memory / 2**20:.0f}"
    yield "" if row.error is None else f"{row.error:.1e} ({row.torch_error:.1e})"
    yield ", ".join(filter(None, [*notes, row.reason.replace("|", "/")]))
