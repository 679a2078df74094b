"""The demonstration: patch, fine-tune with LoRA, compare, undo."""

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from ..core.info import patch_info
from ..core.patching import patch_model
from ..plotting import plot_head_usage
from ..training import optimizer_groups
from . import measuring
from .report import Report, Row, installed_versions
from .tasks import Task
from .training import SCALE_LR, add_lora, fit

# What is compared: a name, the variant, its settings. SSA's alpha starts higher than its default, still close to
# identity (6 % at 30 visible keys), since from -7 a short training would not get it anywhere.
COMPARED: tuple[tuple[str, str | None, dict[str, Any]], ...] = (
    ("LoRA alone", None, {}),
    ("MoH 75 % + LoRA", "moh", {"active_ratio": 0.75}),
    ("SSA + LoRA", "ssa", {"initial_alpha": -4.0}),
)
_ROUNDS = 21  # of the speed measurement
_LEARNT = 0.02  # mean loss at which the training of a base model ends early


def run_demo(
    task: Task, seeds: Sequence[int], output: Path, steps: int | None = None, console: Console | None = None
) -> Report:
    """Train every variant on the task in the same way, measure, undo, and write a report.

    Args:
        task: data and model.
        seeds: one training of every variant for each.
        output: folder for `results.json`, `table.md` and `head_usage.png`; made if missing.
        steps: fine-tuning steps of every variant; the task's own number by default.
        console: where progress and table are printed.

    Returns:
        The report that was written.

    Raises:
        ValueError: no seeds, the same seed twice, or no steps.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"Expected one or more different seeds, got {list(seeds)}.")
    steps = task.steps if steps is None else steps
    if steps < 1:
        raise ValueError(f"The number of steps must be at least 1, got {steps}.")
    output.mkdir(parents=True, exist_ok=True)
    console = console or Console()
    start = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=console) as progress:
        rows = _compare(task, seeds, steps, progress)
    settings = {
        "steps": steps,
        "batch_size": task.batch_size,
        "learning_rate": task.learning_rate,
        "scale_learning_rate": SCALE_LR,
        "lora_rank": task.rank,
        "variants": {name: config for name, _, config in COMPARED},
    }
    seconds = round(time.perf_counter() - start, 1)
    report = Report(task.name, task.model_name, list(seeds), settings, rows, seconds, installed_versions())
    report.write(output)
    routed = next(row for row in rows if row.head_usage)
    figure = plot_head_usage(routed.mean_usage(), title=f"{routed.name}: {task.name}, {task.model_name}")
    figure.savefig(output / "head_usage.png", dpi=150)
    console.print(report.table())
    console.print(f"{seconds:.0f} s. Wrote results.json, table.md and head_usage.png to {output}", soft_wrap=True)
    return report


def _compare(task: Task, seeds: Sequence[int], steps: int, progress: Progress) -> list[Row]:
    base_row = Row("base model")
    rows = {name: Row(name, restored=True) for name, _, _ in COMPARED}
    for seed in seeds:
        base = _base_model(task, seed, progress)
        test = task.test_batches()
        probe = test[len(test) // 2]
        before = measuring.logits(base, probe)
        if task.base_steps:  # a loaded model's new head would answer at random
            base_row.accuracy.append(measuring.accuracy(base, task, test))
        models: dict[str, nn.Module] = {}
        for name, variant, config in COMPARED:
            row = rows[name]
            follow = _follow(progress, f"seed {seed}: {name}", steps)
            models[name] = _train(task, base, variant, config, seed, steps, row, follow)
            row.accuracy.append(measuring.accuracy(models[name], task, test))
            if variant == "moh":
                row.head_usage.append(measuring.head_usage(models[name], test))
        if seed == seeds[-1]:
            speeds = measuring.tokens_per_second({base_row.name: base, **models}, probe, _ROUNDS)
            for row in (base_row, *rows.values()):
                row.tokens_per_second = speeds[row.name]
        for name, variant, _ in COMPARED:
            after = measuring.undo(models[name], is_patched=variant is not None)
            same = torch.equal(measuring.logits(after, probe), before)
            rows[name].restored = rows[name].restored and same
    return [base_row, *rows.values()] if base_row.accuracy else list(rows.values())


def _base_model(task: Task, seed: int, progress: Progress) -> nn.Module:
    """The model to patch: loaded, or trained here."""
    model = task.new_model(seed)
    if task.base_steps:
        follow = _follow(progress, f"seed {seed}: base model", task.base_steps)
        groups = optimizer_groups(model, task.base_learning_rate)
        fit(model, task.train_batches(seed, task.base_steps), task.base_steps, groups, follow, stop_at=_LEARNT)
    return model.eval()


def _train(
    task: Task,
    base: nn.Module,
    variant: str | None,
    config: dict[str, Any],
    seed: int,
    steps: int,
    row: Row,
    follow: Callable[[float], None],
) -> nn.Module:
    """A patched copy of the base model, fine-tuned; notes in its row what was added."""
    model = copy.deepcopy(base)
    if variant is not None:
        patch_model(model, variant, config)
        row.variant_parameters = patch_info(model)["extra_parameters"]
    lora = add_lora(model, task, seed, is_patched=variant is not None)
    row.lora_parameters = sum(p.numel() for name, p in lora.named_parameters() if "lora_" in name)
    # seeds of fine-tuning are kept apart from those of the base model's training
    groups = optimizer_groups(lora, task.learning_rate, scale_learning_rate=SCALE_LR)
    fit(lora, task.train_batches(1000 + seed, steps), steps, groups, follow)
    return lora


def _follow(progress: Progress, description: str, steps: int) -> Callable[[float], None]:
    bar = progress.add_task(description, total=steps, loss=float("nan"))
    return lambda loss: progress.update(bar, advance=1, loss=loss)
