"""The command `patchattn eval`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..core.settings import Settings, option
from ..files.documents import concerning, quoted, read_yaml


@dataclass(frozen=True, kw_only=True)
class EvalSettings(Settings):
    """What `patchattn eval` is told, on the command line or in a YAML file.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """

    model: str = option(help="Folder or Hub id of a causal language model, a classifier or a vision-language model.")
    tasks: tuple[str, ...] = option(help="Tasks, or benchmarks for all their tasks.")
    output: str = option(help="Folder for answers and report.")
    runs: dict[str, Any] = option(
        {},
        help="Name of a run to its variants with their settings, outermost first, or to the folder of a saved patch.",
    )
    task_settings: dict[str, Any] = option({}, help="Name of a task or a benchmark to its settings.")
    data: str | None = option(None, help="Files of every task that reads files; the Hub without.")
    tokenizer: str | None = option(None, help="Folder or Hub id of the tokenizer or processor; the model's without.")
    device: str | None = option(None, help="Device, such as cuda; a GPU per process by default where there are some.")
    batch: int = option(8, help="Samples that a task answers at once.", minimum=1)
    seed: int = option(0, help="Seed of what a new patch starts from, and of what draws in the model.", minimum=0)
    limit: int | None = option(None, help="Only so many samples of each task, the first ones.", minimum=1)


def evaluate_model(
    model: Annotated[str | None, typer.Argument(help="Folder or Hub id of a model; patched, if saved so.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with any of these settings; options win.")] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="Variant to measure, or several on one model, as in ssa+moh; repeat it for several models."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting, active_ratio=0.5 say; moh.active_ratio=0.5 where variants are several."),
    ] = None,
    patch: Annotated[
        list[str] | None, typer.Option(help="Folder of a saved patch to measure; may be repeated.")
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Tasks, separated by commas: glue/sst2,perplexity; glue is all of GLUE.")
    ] = None,
    task_settings: Annotated[
        list[str] | None, typer.Option("--task-set", help="A setting of a task: needle.lengths=[256,512].")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Files of every task that reads files; the Hub without.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder for answers and report.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the tokenizer; the model's without.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Samples that a task answers at once; 8 by default.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of new patches and of what draws in the model; 0.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many samples of each task.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Device, such as cuda; a GPU by default where there is one.")
    ] = None,
) -> None:
    """Measure a model without patches and with them: scores, time and memory, in one report.

    A killed run goes on where it was. Under accelerate launch, processes share the work.
    """
    from .common import parse_settings

    values = {} if config is None else read_yaml(config)  # to be checked together with the options
    runs = _runs(variant or [], parse_settings(settings or []), patch or [])
    if runs and values.get("runs"):
        raise ValueError(f"{config} has runs: leave out --variant and --patch.")
    given = {
        "model": model,
        "tasks": [name.strip() for text in tasks for name in text.split(",")] if tasks else None,
        "output": output,
        "runs": runs or None,
        "data": data,
        "tokenizer": tokenizer,
        "batch": batch,
        "seed": seed,
        "limit": limit,
        "device": device,
    }
    values |= {name: value for name, value in given.items() if value is not None}
    for name, value in parse_settings(task_settings or [], "--task-set").items():
        task, dot, key = name.rpartition(".")
        if not dot:
            raise ValueError(f"--task-set expects task.name=value, such as needle.depths=[0,50], got {name!r}.")
        settings_of = values.setdefault("task_settings", {})
        if not isinstance(settings_of, dict) or not isinstance(settings_of.setdefault(task, {}), dict):
            raise TypeError(f"{config}: task_settings must map names of tasks to settings by name.")
        settings_of[task][key] = value
    with concerning(config):
        made = EvalSettings.from_dict(values)
    run_eval(made)


def run_eval(settings: EvalSettings) -> dict[str, Any]:
    """Do what the command does; returns what `report.json` holds.

    Raises:
        ValueError, TypeError, NotImplementedError: whatever is wrong; all of it that can be found without the model's
            weights is found before they are loaded.
    """
    from ..evaluation.run.compare import check_runs, compare, processes
    from ..evaluation.run.loading import find_source
    from ..evaluation.tasks.registry import make_tasks, task_names
    from .common import quiet
    from .devices import choose_device

    task_names(settings.tasks)
    for run in settings.runs.values():
        _check_run(run)
    source = find_source(settings.model)
    if source.is_patched == bool(settings.runs):
        raise ValueError(
            f"{settings.model} was saved patched, and is compared with itself unpatched: leave out variants and "
            "patches, or give its base model."
            if source.is_patched
            else "There is nothing to compare with the unpatched model: give --variant or --patch, or runs in a file."
        )
    if settings.runs:
        check_runs(list(settings.runs))
    chosen = None if settings.device is None else choose_device(settings.device)
    try:
        tasks = make_tasks(settings.tasks, source.kind, data=settings.data, settings=settings.task_settings)
    except ImportError as error:  # it says what to install
        raise ValueError(str(error)) from error
    state = processes(cpu=settings.device == "cpu")
    if state.num_processes > 1 and settings.device not in (None, "cpu"):
        raise ValueError(f"Several processes choose their devices themselves: leave out device={settings.device!r}.")
    _make_folder(Path(settings.output))
    quiet()
    tokenizer = source.load_tokenizer(settings.tokenizer)
    model = source.load(chosen or state.device)
    if source.kind == "classifier" and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    report = compare(
        model,
        tokenizer,
        tasks,
        settings.output,
        settings.runs or None,
        batch=settings.batch,
        seed=settings.seed,
        limit=settings.limit,
    )
    if state.is_main_process:
        _show(report, settings.output)
    state.destroy_process_group()
    return report


def _make_folder(path: Path) -> None:
    """Make the output folder, or say why it cannot be written to before anything is computed."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"The output folder {str(path)!r} cannot be made: {error.strerror}.") from error
    if not os.access(path, os.W_OK):
        raise ValueError(f"The output folder {str(path)!r} cannot be written to.")


def _show(report: dict[str, Any], output: str) -> None:
    from rich.table import Table

    from ..evaluation.report.report import table

    head, rows = table(report)
    console = Console()
    scores, costs = [0, 1, 2, 3, 4], [0, 2, *range(5, len(head))]
    for columns in (scores, costs) if len(head) > 5 else (scores,):  # side by side they are too wide for a terminal
        shown = Table(*(head[i] for i in columns))
        for row in rows:
            if columns is scores or any(row[5:]):  # averages have no costs
                shown.add_row(*(row[i] for i in columns))
        console.print(shown)
    console.print(f"Wrote report.json, report.md and report.html to {output}", soft_wrap=True, highlight=False)


def _runs(variants: Sequence[str], settings: dict[str, Any], patches: Sequence[str]) -> dict[str, Any]:
    """A run per variant or combination, and per saved patch, which is called like its folder."""
    runs: dict[str, Any] = {text: {name.strip(): {} for name in text.split("+")} for text in variants}
    if len(runs) < len(variants):
        raise ValueError("The same variants twice: name runs with other settings in a file, for --config.")
    if twice := [text for text, run in runs.items() if len(run) < len(text.split("+"))]:
        raise ValueError(f"--variant {twice[0]} names a variant twice.")
    names = {name for run in runs.values() for name in run}
    for key, value in settings.items():
        name, dot, setting = key.rpartition(".")
        if not dot:
            if len(names) != 1:
                raise ValueError(f"--set {key} needs the name of its variant, such as moh.{key}, got {sorted(names)}.")
            (name,) = names
        if name not in names:
            raise ValueError(f"--set {key}: there is no --variant {name}.")
        for run in runs.values():
            if name in run:
                run[name][setting] = value
    for folder in patches:
        if runs.setdefault(Path(folder).name, folder) != folder:
            raise ValueError(f"Two runs would be called {Path(folder).name!r}: name them in a file, for --config.")
    return runs


def _check_run(run: Any) -> None:
    """What can be said of a run without a model."""
    from ..core.registry import variant_info
    from ..saving.patch_files import read_patch

    if isinstance(run, str):
        if Path(run).is_dir():
            read_patch(Path(run))
    elif not isinstance(run, dict) or not run:
        raise TypeError(
            f"A run is a mapping of variants to settings, or the folder of a saved patch, got {quoted(run)}."
        )
    else:
        for name, settings in run.items():
            variant_info(name).configure(settings)
