"""Reports of `patchattn eval`, one per variant of a model, as one table and one Pareto picture.

    python benchmarks/eval_table.py docs/results/eval/stories260K --score perplexity --speed speed --output pareto.png
    python benchmarks/eval_table.py docs/results/eval/MiniLM --score glue/sst2 --speed glue/sst2:samples_per_second ...

Every report holds an unpatched model of its own, since times compare within one report alone. A run's speed is
therefore a share of that of the unpatched model beside it; the picture is drawn over it.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from patchattn.evaluation.report.report import UNPATCHED, markdown_table, number, read_report
from patchattn.plotting.pareto import ParetoPoint, plot_pareto


def relative_speed(report: dict[str, Any], run: str, speed: str) -> float | None:
    """`TASK` for a task whose main score is a speed, or `TASK:COST`; None where the report has no such task."""
    name, _, cost = speed.partition(":")
    if name not in report["tasks"]:
        return None
    task = report["tasks"][name]
    here, base = (
        task["runs"][each]["costs"][cost] if cost else task["runs"][each]["scores"][task["main_score"]]
        for each in (run, UNPATCHED)
    )
    return here / base


def scores(report: dict[str, Any], run: str) -> dict[str, float | None]:
    """The main score of every task of a run."""
    return {name: task["runs"][run]["scores"][task["main_score"]] for name, task in report["tasks"].items()}


def main(
    folder: Annotated[Path, typer.Argument(help="With a folder per variant, a report in each.")],
    score: Annotated[str, typer.Option(help="Task whose main score is drawn.")],
    speed: Annotated[str, typer.Option(help="Task whose main score is a speed, or TASK:COST.")],
    output: Annotated[Path, typer.Option(help="The picture.")],
    skip: Annotated[list[str] | None, typer.Option(help="Folders to leave out.")] = None,
) -> None:
    """Print the table, and draw score over speed."""
    paths = [path for path in sorted(folder.glob("*/report.json")) if path.parent.name not in (skip or [])]
    if not paths:
        sys.exit(f"There are no reports in {folder}: expected VARIANT/report.json.")
    reports = {path.parent.name: read_report(path) for path in paths}
    tasks = list(dict.fromkeys(name for report in reports.values() for name in report["tasks"]))
    if score not in tasks:
        sys.exit(f"No report in {folder} has the task {score!r}: expected one of {', '.join(tasks)}.")
    scored = {
        name: next(report["tasks"][name] for report in reports.values() if name in report["tasks"])
        for name in tasks
        if name != speed
    }
    rows: dict[str, list[str]] = {UNPATCHED: []}
    points = []
    unpatched = {name: about["runs"][UNPATCHED]["scores"][about["main_score"]] for name, about in scored.items()}
    for variant, report in reports.items():
        for run, made in report["runs"].items():
            name = UNPATCHED if run == UNPATCHED else f"{variant}, {run}"
            if rows.get(name):  # the unpatched model is in every report, with the same scores
                continue
            values = unpatched if run == UNPATCHED else scores(report, run)
            share = 1.0 if run == UNPATCHED else relative_speed(report, run, speed)
            shown = [number(values.get(task)) for task in scored]
            rows[name] = [name, *shown, number(share), f"{made['parameters']:,}"]
            if (value := values.get(score)) is not None and share is not None:
                points.append(ParetoPoint(name, value, share))
    heads = [f"{name}, {about['unit']}" if about["unit"] else name for name, about in scored.items()]
    print("\n".join(markdown_table(["run", *heads, "speed", "parameters"], list(rows.values()), texts=1)))
    about = scored[score]
    figure = plot_pareto(
        points,
        score=f"{score}: {about['main_score'].replace('_', ' ')}",
        cost="speed, times that of the unpatched model",
        higher_is_better=about["higher_is_better"],
        lower_cost_is_better=False,
        title=folder.name,
    )
    figure.savefig(output, dpi=150)


if __name__ == "__main__":
    typer.run(main)
