"""The command `patchattn bench`, also `python -m patchattn bench`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from ..bench.plan import Step
    from ..bench.result import Result
    from ..bench.results import Report


def bench(
    suite: Annotated[
        str, typer.Option(help="Suite: goals (minutes on a GPU), full (hours) or smoke (seconds, also on a CPU).")
    ] = "goals",
    op: Annotated[list[str] | None, typer.Option(help="Only this operation, such as routed; may be repeated.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for bench.json, bench.md and the pictures.")] = Path(
        "patchattn_bench"
    ),
    device: Annotated[
        str | None, typer.Option(help="Device, such as cuda:1 or cpu; a GPU by default where there is one.")
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Choose launch settings first, for shapes that none are known for.")
    ] = False,
    seconds: Annotated[float, typer.Option(help="To spend on timing each implementation.", min=0.0)] = 0.5,
    case_limit: Annotated[
        float, typer.Option(help="Seconds after which no further implementation of a case begins.", min=0.0)
    ] = 90.0,
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds after which nothing more begins; 480 for goals, else none.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only what the goals of docs/performance.md compare: 8 minutes of a GPU.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the finished cases of the bench.json in the folder, run the others.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be run, and what it answers; needs no GPU.")
    ] = False,
) -> None:
    """Time our operations beside dense, masked, FlexAttention and eager ones; nothing wrong is timed.

    Every implementation is first compared with float64 on a slice of the very operands that are timed. Those of a case
    take turns. Results are written after every case, so that a run that is cut off keeps them; --resume goes on there.
    """
    import shlex
    import sys
    import time

    import torch

    from ..bench.ceilings import measure_ceilings
    from ..bench.plan import plan
    from ..bench.results import Report, conditions, machine
    from ..bench.runner import run_case
    from .devices import choose_device

    if quick and suite != "goals":
        raise ValueError(
            f"--quick is a part of the suite 'goals': it cannot be the suite {suite!r}. Give one of the two."
        )
    steps = plan("quick" if quick else suite, tuple(op or ()))
    limit = 480.0 if time_limit is None and suite == "goals" else time_limit
    console, began, file = Console(highlight=False), time.monotonic(), output / "bench.json"
    resume = resume and file.exists()
    if dry_run:
        _list(console, steps, Report.read(file) if resume else Report({}), limit)
        return
    chosen = choose_device(device)
    if suite != "smoke" and chosen.type == "cpu":
        raise ValueError(f"The suite {suite!r} needs a GPU, and the device is a CPU: choose --suite smoke.")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    facts = machine(chosen, shlex.join(["patchattn", *_arguments(sys.argv[1:])]))
    report = Report.resumed(file, facts) if resume else Report(facts)
    left = [step for step in steps if not report.finished(step.case, step.names)]
    output.mkdir(parents=True, exist_ok=True)
    end = float("inf") if limit is None else began + limit
    dtypes = {step.case.dtype for step in left}
    if report.ceilings is None or dtypes - report.ceilings.products.keys():
        report.ceilings = measure_ceilings(chosen, dtypes, seconds=min(seconds, 0.3))
    for number, (case, implementations, _) in enumerate(left, start=len(steps) - len(left) + 1):
        deadline = min(end, time.monotonic() + case_limit)
        console.print(f"[bold]{number}/{len(steps)}[/] {case.name} ({time.monotonic() - began:.0f} s so far)")
        report.without(case)
        before = conditions(chosen, case, "before")
        for result in run_case(
            case,
            chosen,
            report.ceilings,
            seconds=seconds,
            deadline=deadline,
            tune=tune,
            implementations=implementations,
        ):
            report.results.append(result)
            console.print(f"    {_line(result)}", markup=False, soft_wrap=True)
        report.conditions += [told for told in (before, conditions(chosen, case, "after")) if told]
        write(report, output)
    draw(report, output)
    console.print(f"{time.monotonic() - began:.0f} s. Wrote {output}", soft_wrap=True)


def _list(console: Console, steps: "list[Step]", report: "Report", limit: float | None) -> None:
    """What would be run, beside what a report has."""
    left = [step for step in steps if not report.finished(step.case, step.names)]
    done = len(steps) - len(left)
    for number, step in enumerate(left, start=done + 1):
        text = f"{number}/{len(steps)} {step.case.name}: {', '.join(step.names)}"
        console.print(text, markup=False, soft_wrap=True)
        for goal in step.answers:
            console.print(f"    answers: {goal}", markup=False, soft_wrap=True)
    kept = f" {done} are finished and kept." if done else ""
    until = "" if limit is None else f" Nothing begins after {limit:g} s."
    console.print(f"{len(left)} cases.{kept}{until} Nothing was run.", markup=False, soft_wrap=True)


def write(report: "Report", folder: Path) -> None:
    """Tables: `bench.json` and `bench.md`."""
    from ..bench.report import to_markdown

    report.write(folder / "bench.json")
    (folder / "bench.md").write_text(to_markdown(report), encoding="utf-8")


def draw(report: "Report", folder: Path) -> None:
    """Pictures: one per operation."""
    from ..bench.plots import plot_operation

    for op in dict.fromkeys(result.case.op for result in report.results):
        figure = plot_operation(report.results, op)
        if figure is not None:
            figure.savefig(folder / f"{op}.png", dpi=130)


def _arguments(given: list[str]) -> list[str]:
    """Those of `patchattn`, however it was called."""
    return given if given[:1] == ["bench"] else ["bench", *given]


def _line(result: "Result") -> str:
    if result.seconds is None:
        return f"{result.implementation}: {result.status} ({result.reason})"
    memory = "" if result.peak_memory is None else f", {result.peak_memory / 2**20:.0f} MiB"
    kernel = f", {result.kernel}" if result.kernel else ""
    share = f"{result.share_of_ceiling:.0%} of the ceiling"
    graph = "" if result.graph_seconds is None else f" ({result.graph_seconds * 1e3:.4g} in a CUDA graph)"
    return f"{result.implementation}: {result.seconds * 1e3:.4g} ms{graph}, {share}{memory}{kernel}"
