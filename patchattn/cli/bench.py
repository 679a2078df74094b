"""The command `patchattn bench`, also `python -m patchattn bench`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
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
) -> None:
    """Time our operations beside dense, masked, FlexAttention and eager ones; nothing wrong is timed.

    Every implementation is first compared with float64 on a slice of the very operands that are timed. Results are
    written after every case, so that a run that is cut off keeps them.
    """
    import shlex
    import sys
    import time

    import torch

    from ..bench.cases import suite as cases_of
    from ..bench.ceilings import measure_ceilings
    from ..bench.results import Report, machine
    from ..bench.runner import run_case
    from .devices import choose_device

    cases = cases_of(suite, tuple(op or ()))
    chosen = choose_device(device)
    if suite != "smoke" and chosen.type == "cpu":
        raise ValueError(f"The suite {suite!r} needs a GPU, and the device is a CPU: choose --suite smoke.")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    output.mkdir(parents=True, exist_ok=True)
    console, began = Console(highlight=False), time.monotonic()
    limit = 480.0 if time_limit is None and suite == "goals" else time_limit
    end = float("inf") if limit is None else began + limit
    report = Report(machine(chosen, shlex.join(["patchattn", *_arguments(sys.argv[1:])])))
    report.ceilings = measure_ceilings(chosen, {case.dtype for case in cases}, seconds=min(seconds, 0.3))
    for number, case in enumerate(cases, start=1):
        deadline = min(end, time.monotonic() + case_limit)
        console.print(f"[bold]{number}/{len(cases)}[/] {case.name} ({time.monotonic() - began:.0f} s so far)")
        for result in run_case(case, chosen, report.ceilings, seconds=seconds, deadline=deadline, tune=tune):
            report.results.append(result)
            console.print(f"    {_line(result)}", markup=False, soft_wrap=True)
        write(report, output)
    draw(report, output)
    console.print(f"{time.monotonic() - began:.0f} s. Wrote {output}", soft_wrap=True)


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
    return f"{result.implementation}: {result.seconds * 1e3:.4g} ms, {share}{memory}{kernel}"
