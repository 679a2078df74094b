"""What pictures take from the reports of `patchattn eval`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..core.settings import nearest
from ..evaluation.report.report import read_report
from ..evaluation.report.report_figures import COSTS
from ..evaluation.run.compare import folder_name
from ..files.documents import decoded, json_lines, laid_out
from ..plotting.pareto import ParetoPoint

_MORE_IS_BETTER = {"tokens_per_second", "samples_per_second"}  # of the costs


def named_runs(reports: Sequence[Path]) -> Iterator[tuple[str, Path, str, dict[str, Any]]]:
    """Of every run a name, the folder of its report, its name there, and the report.

    With several reports the folder is in the name.
    """
    for path in reports:
        report, folder = read_report(path), path if path.is_dir() else path.parent
        for run in report["runs"]:
            yield (run if len(reports) == 1 else f"{folder.resolve().name}: {run}"), folder, run, report


def task_rows(folder: Path, run: str, task: str) -> list[dict[str, Any]]:
    """The rows of one task of a run, in the order of its samples.

    Raises:
        ValueError: there are none.
    """
    files = sorted((folder / folder_name(run) / task).glob("process_*.jsonl"))
    rows = []
    for file in files:
        content = file.read_bytes()  # a run that was killed has cut off the last line
        for number, row in json_lines(decoded(content[: content.rfind(b"\n") + 1], file), file):
            if not isinstance(row, dict) or not isinstance(row.get("index"), int):
                raise ValueError(f"{file}, line {number}: not an answer of `patchattn eval`.")
            rows.append(row)
    if not rows:
        raise ValueError(f"{folder} holds no answers of the task {task!r} of the run {run!r}.")
    return [row for _, row in sorted({row["index"]: row for row in rows}.items())]


def pareto_points(
    reports: Sequence[Path], task: str | None, cost: str | None
) -> tuple[list[ParetoPoint], dict[str, Any]]:
    """Points of all runs, and how `plot_pareto` is to label them.

    Raises:
        ValueError: no such report, task or cost; or a run without.
    """
    with laid_out(reports[0] if len(reports) == 1 else "one of the reports"):
        return _pareto_points(list(named_runs(reports)), task, cost)


def _pareto_points(
    runs: list[tuple[str, Path, str, dict[str, Any]]], task: str | None, cost: str | None
) -> tuple[list[ParetoPoint], dict[str, Any]]:
    tasks = list(dict.fromkeys(name for *_, report in runs for name in report["tasks"]))
    if task is None and len(tasks) > 1:
        raise ValueError(f"There are several tasks, choose one with --task: {', '.join(tasks)}.")
    task = tasks[0] if task is None else task
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for name, folder, run, report in runs:
        if task not in report["tasks"]:
            raise ValueError(f"{folder} has no task {task!r}{nearest(task, list(report['tasks']))}")
        found[name] = (report["tasks"][task], report["tasks"][task]["runs"][run])
    known = [key for key, *_ in COSTS if all(key in values["costs"] for _, values in found.values())]
    if not known:
        without = [name for name, (_, values) in found.items() if not values["costs"]] or list(found)
        raise ValueError(
            f"The runs {', '.join(without)} share no cost of the task {task!r} that was measured: a report without "
            "`costs` is damaged, others are written by `patchattn eval`."
        )
    cost = known[0] if cost is None else cost
    if cost not in known:
        raise ValueError(f"There is no cost {cost!r} of all runs{nearest(cost, known)}")
    _, heading, unit, divisor = next(entry for entry in COSTS if entry[0] == cost)
    about = next(iter(found.values()))[0]
    points = []
    for name, (_, values) in found.items():
        score = values["scores"][about["main_score"]]
        if score is None:
            raise ValueError(f"The run {name!r} has no score of the task {task!r}: it is not a number.")
        points.append(ParetoPoint(name, score, values["costs"][cost] / divisor))
    measured = about["main_score"].replace("_", " ")
    named = measured if measured == task else f"{task}: {measured}"
    labels = {
        "score": f"{named}{', ' if about['unit'] else ''}{about['unit']}",
        "cost": f"{heading}, {unit}",
        "higher_is_better": about["higher_is_better"],
        "lower_cost_is_better": cost not in _MORE_IS_BETTER,
    }
    return points, labels
