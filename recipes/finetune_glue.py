"""Train an encoder on tasks of GLUE under several variants and seeds; one table of the official metrics per task.

    python recipes/finetune_glue.py recipes/configs/glue_lora.yaml

The configuration and local files are checked whole before a model is loaded. Paths in it are relative to where the
recipe is started. Every run has its own folder, `<output>/<task>/<run>/seed_<seed>`: started again after a kill, the
recipe leaves finished runs alone.
"""

import gc
import math
import os
import re
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import datasets
import torch
import transformers
import typer
from recipe_common import (
    EFFECT,
    METRICS_FILE,
    SETTINGS_FILE,
    PatchedTrainer,
    TrainingSettings,
    begin,
    defines,
    finished,
    prepare,
    train,
)
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PrinterCallback,
)

from patchattn import Observation, Settings, find_sites, observe, option
from patchattn.evaluation.metrics.glue import Glue
from patchattn.evaluation.tasks.glue import glue_task, load_glue, read_glue
from patchattn.files.documents import write_json

UNPATCHED = "unpatched"
POOL = 16  # batches


@dataclass(frozen=True, kw_only=True)
class GlueTraining(TrainingSettings):
    """One run of the recipe: a task, variants and a seed."""

    model: str = option(help="Folder or Hub id of an encoder with its tokenizer.")
    data: str | None = option(None, help="Folder with one folder per task; None: from the Hub.")
    task: str = option(help="Name of a task of GLUE.")
    max_length: int = option(128, help="Tokens of a row; what is longer is cut.", minimum=4)
    train_rows: int | None = option(None, help="Rows to train on, drawn once for all runs; None: all.", minimum=1)


def parse_runs(given: Any) -> dict[str, dict[str, Any]]:
    """Runs by name, the unpatched one added if every other has variants."""
    if not isinstance(given, dict):
        raise TypeError(f"runs must map names to variants with their settings, got {given!r}.")
    runs = {name: {} if variants is None else variants for name, variants in given.items()}
    for name, variants in runs.items():
        if not isinstance(variants, dict) or not isinstance(name, str):
            raise TypeError(f"runs must map names to variants with their settings, got {name!r}: {variants!r}.")
    if all(runs.values()):
        if UNPATCHED in runs:
            raise ValueError(f"The run {UNPATCHED!r} has variants; give it another name.")
        runs = {UNPATCHED: {}, **runs}
    folders = {folder_name(name): name for name in runs}
    if lost := [name for name in runs if folders[folder_name(name)] != name]:
        raise ValueError(f"The runs {lost[0]!r} and {folders[folder_name(lost[0])]!r} would share a folder.")
    return runs


@dataclass(frozen=True, kw_only=True)
class GlueSettings(Settings):
    """Train an encoder on tasks of GLUE under several variants and seeds.

    Raises:
        TypeError, ValueError: when made, whatever is wrong with it or with the files in `data`.
    """

    model: str = option(help="Folder or Hub id of an encoder with its tokenizer.")
    data: str | None = option(None, help="Folder with one folder per task (CoLA, SST-2, ...); None: from the Hub.")
    output: str = option(help="Folder for the runs, results.json and table.md.")
    tasks: tuple[str, ...] = option(help="Names of tasks, such as sst2.")
    runs: dict[str, dict[str, Any]] = option(
        parse=parse_runs,
        help="Name of a row of the table to its variants. A row without variants, the unpatched model trained alike, "
        "is added if there is none.",
    )
    seeds: tuple[int, ...] = option((0,), help="One training of every row for each.", minimum=0)
    training: dict[str, Any] = option(
        help="Settings of every run: max_length, train_rows, and what all recipes have but output, variants and seed. "
        "What only some variants know, such as balance_weight, is left out for rows without them."
    )
    task_training: dict[str, Any] = option({}, help="Name of a task to what differs for it from training.")
    keep_models: bool = option(False, help="Keep the trained model of every run, not only its metrics.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tasks", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be one or more different ones, got {list(values)}.")
        self._check_training()
        for task in self.tasks:
            asked = glue_task(task)
            if self.data is not None:
                read_glue(Path(self.data) / asked.folder, task)
        list(self.trainings())  # raises what is wrong with them

    def _check_training(self) -> None:
        for task, values in self.task_training.items():
            if task not in self.tasks:
                raise ValueError(f"task_training is for {task!r}, but tasks are {', '.join(self.tasks)}.")
            if not isinstance(values, dict):
                raise TypeError(f"task_training must map {task!r} to settings, got {values!r}.")
        given = set(self.training).union(*self.task_training.values())
        for name, instead in {"variants": "runs", "seed": "seeds"}.items():
            if name in given:
                raise ValueError(f"training holds {name}; give {instead} instead.")
        if twice := sorted(given & {"model", "data", "output", "task"}):
            raise ValueError(f"{twice[0]} does not belong into training.")
        for name in given & EFFECT.keys():
            if not any(defines(variant, EFFECT[name]) for variants in self.runs.values() for variant in variants):
                raise ValueError(f"training.{name} has no effect on the variants of any run.")

    def trainings(self) -> Iterator[tuple[str, GlueTraining]]:
        """Every run with the name of its row: all of the first seed first, so that a stop leaves whole tables."""
        for seed in self.seeds:
            for task in self.tasks:
                for row, variants in self.runs.items():
                    values = {**self.training, **self.task_training.get(task, {})}
                    for name, member in EFFECT.items():
                        if not any(defines(variant, member) for variant in variants):
                            values.pop(name, None)
                    values |= {"model": self.model, "data": self.data, "task": task, "seed": seed}
                    output = str(Path(self.output) / task / folder_name(row) / f"seed_{seed}")
                    yield row, GlueTraining.from_dict({**values, "variants": variants, "output": output})


def folder_name(row: str) -> str:
    """The name of a row as that of a folder."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", row).strip("_")


class Task:
    """The rows of a task as the model gets them, the same for every run.

    Args:
        settings: of any of its runs.
        tokenizer: of the model.

    Raises:
        ValueError: the tokenizer cannot pad.
    """

    def __init__(self, settings: GlueTraining, tokenizer: Any) -> None:
        if tokenizer.pad_token is None:
            raise ValueError(
                f"The tokenizer of {settings.model} has no padding token: choose an encoder, such as BERT."
            )
        self.asked = glue_task(settings.task)
        self.tokenizer, self.max_length = tokenizer, settings.max_length
        rows, evaluation = load_glue(settings.task, settings.data)
        if settings.train_rows is not None and settings.train_rows < len(rows):
            rows = rows.shuffle(seed=0).select(range(settings.train_rows))
        self.train, self.lengths = self._encoded(rows)
        encoded, lengths = self._encoded(evaluation)
        # As in training, to save padding; the order of an evaluation does not matter.
        self.evaluation = encoded.select(sorted(range(len(lengths)), key=lengths.__getitem__))
        self.collate = DataCollatorWithPadding(tokenizer)

    def training_rows(self, settings: GlueTraining, processes: int) -> Any:
        """All rows of a training in their order, which depends on the seed alone.

        Rows of similar length share a batch: shuffled rows are sorted within pools of a few batches, and the batches
        of a pool are shuffled.
        """
        generator = torch.Generator().manual_seed(settings.seed)
        count = len(self.train)
        if settings.steps is None:
            needed = math.ceil(settings.epochs * count)
        else:
            needed = settings.steps * settings.batch * settings.accumulation * processes
        passes = [torch.randperm(count, generator=generator).tolist() for _ in range(math.ceil(needed / count))]
        shuffled = [row for order in passes for row in order][:needed]
        order: list[int] = []
        for start in range(0, needed, POOL * settings.batch):
            pool = sorted(shuffled[start : start + POOL * settings.batch], key=self.lengths.__getitem__)
            batches = [pool[i : i + settings.batch] for i in range(0, len(pool), settings.batch)]
            order += [row for i in torch.randperm(len(batches), generator=generator).tolist() for row in batches[i]]
        return self.train.select(order)

    def _encoded(self, rows: Any) -> tuple[Any, list[int]]:
        """Rows as the model takes them, and how many tokens each has."""
        texts = [list(rows["sentence1"])]
        if len(self.asked.texts) == 2:
            texts.append(list(rows["sentence2"]))
        encoded = self.tokenizer(*texts, truncation=True, max_length=self.max_length)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        return datasets.Dataset.from_dict({**encoded, "labels": list(rows["label"])}), lengths

    def model(self, name: str) -> Any:
        """The model, unpatched, with a new head."""
        outputs = 1 if self.asked.is_regression else len(self.asked.labels)
        kind = "regression" if self.asked.is_regression else "single_label_classification"
        return AutoModelForSequenceClassification.from_pretrained(name, num_labels=outputs, problem_type=kind)

    def answers(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """`(B,)` labels or scores from `(B, C)`."""
        return logits.squeeze(-1) if self.asked.is_regression else logits.argmax(-1)

    def metric(self, evaluation: EvalPrediction) -> dict[str, float]:
        """The official metric."""
        metric = Glue(self.asked.name, keep_in_memory=True)
        return metric.compute(predictions=evaluation.predictions, references=evaluation.label_ids)


def new_heads(model: Any) -> list[str]:
    """Names of what stands beside the pretrained body and has parameters."""
    return [name for name, child in model.named_children() if name != model.base_model_prefix and [*child.parameters()]]


def active_ratio(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """Mean share of the query heads that are on, over the real tokens of a batch and all attention modules."""
    shares: dict[str, float] = {}

    def note(seen: Observation) -> None:
        gate = seen.values.get("gate")
        if gate is not None:
            real = seen.real_tokens().expand(gate.shape[:2])
            shares[seen.site.name] = float((gate != 0)[real].double().mean())

    with torch.no_grad(), observe(model, note):
        model.eval()(**batch)
    sites = len(find_sites(model))
    return (sum(shares.values()) + sites - len(shares)) / sites  # without a gate all heads are on


def run_one(settings: GlueTraining, task: Task, *, keep_model: bool) -> dict[str, Any]:
    """Train and evaluate once; returns what `metrics.json` holds."""
    arguments = begin(settings, label_names=["labels"], disable_tqdm=True, train_sampling_strategy="sequential")
    arguments.num_train_epochs = 1  # `training_rows` holds all of them
    model = task.model(settings.model)
    trainer = PatchedTrainer.of(
        prepare(model, settings, heads=new_heads(model)),
        settings,
        arguments,
        mean_loss=True,
        train_dataset=task.training_rows(settings, arguments.world_size),
        eval_dataset=task.evaluation,
        data_collator=task.collate,
        processing_class=task.tokenizer,
        compute_metrics=task.metric,
        preprocess_logits_for_metrics=task.answers,
    )
    trainer.remove_callback(PrinterCallback)
    batch = task.collate([task.evaluation[row] for row in range(min(settings.eval_batch, len(task.evaluation)))])
    ratio = active_ratio(trainer.model, dict(batch.to(arguments.device))) if settings.variants else 1.0
    rows = {"train_rows": len(task.train), "eval_rows": len(task.evaluation)}
    metrics = train(trainer, settings, evaluate_first=False, active_ratio=ratio, **rows)
    if arguments.process_index == 0 and not keep_model:
        for path in Path(settings.output).iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (SETTINGS_FILE, METRICS_FILE):
                path.unlink()
    return metrics


def run(settings: GlueSettings) -> dict[str, Any]:
    """Do every run that is not finished yet; returns what `results.json` holds.

    Raises:
        ValueError: a run was begun with other settings.
    """
    trainings = [(row, training, finished(training)) for row, training in settings.trainings()]
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    tasks: dict[str, Task] = {}
    done: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for number, (row, training, metrics) in enumerate(trainings, 1):
        if metrics is None:
            if training.task not in tasks:
                tasks[training.task] = Task(training, tokenizer)
            metrics = run_one(training, tasks[training.task], keep_model=settings.keep_models)
            gc.collect()  # a Trainer is full of cycles
        done.setdefault(training.task, {}).setdefault(row, []).append(metrics)
        values = ", ".join(f"{name} {100 * value:.1f} %" for name, value in scores(metrics).items())
        name = f"{training.task}, {row}, seed {training.seed}"
        say(f"[{number}/{len(trainings)}] {name}: {values}, {metrics['seconds']} s")
    results = {
        "tasks": {task: {row: summary(runs) for row, runs in rows.items()} for task, rows in done.items()},
        "versions": metrics["versions"],
        "settings": settings.to_dict(),
    }
    if is_first_process():
        write_json(Path(settings.output) / "results.json", results)
        (Path(settings.output) / "table.md").write_text(table(results), encoding="utf-8")
    return results


def scores(metrics: dict[str, Any]) -> dict[str, float]:
    """The official metrics of a run."""
    return {name: value for name, value in metrics["after"].items() if name not in ("loss", "step")}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs of one row of a table, one per seed; `sd` is the standard deviation of a sample."""
    values = {name: [scores(metrics)[name] for metrics in runs] for name in scores(runs[0])}
    return {
        "seeds": [metrics["settings"]["seed"] for metrics in runs],
        "scores": {
            name: {
                "values": given,
                "mean": statistics.fmean(given),
                "sd": statistics.stdev(given) if len(given) > 1 else None,
            }
            for name, given in values.items()
        },
        "seconds": statistics.fmean(metrics["seconds"] for metrics in runs),
        **{key: runs[0][key] for key in ("active_ratio", "trained_parameters", "train_rows", "eval_rows")},
    }


def table(results: dict[str, Any]) -> str:
    """One Markdown table per task, metrics in percent."""
    parts = []
    for task, rows in results["tasks"].items():
        first = next(iter(rows.values()))
        names = list(first["scores"])
        head = ["run", *(f"{name}, %" for name in names), "active heads, %", "trained parameters", "seconds"]
        lines = [head, ["---", *["---:"] * (len(head) - 1)]]
        for row, values in rows.items():
            cells = [spread(**values["scores"][name]) for name in names]
            fixed = (f"{100 * values['active_ratio']:.1f}", f"{values['trained_parameters']:,}")
            lines.append([row, *cells, *fixed, f"{values['seconds']:.0f}"])
        title = f"{task}: {first['train_rows']:,} rows to train on, {first['eval_rows']:,} to evaluate on; seeds "
        title += ", ".join(map(str, first["seeds"]))
        parts.append("\n".join([title, "", *(f"| {' | '.join(line)} |" for line in lines)]))
    return "\n\n".join(parts) + "\n"


def spread(mean: float, sd: float | None, values: Sequence[float]) -> str:
    """Mean and standard deviation in percent."""
    return f"{100 * mean:.1f}" + ("" if sd is None else f" ± {100 * sd:.1f}")


def is_first_process() -> bool:
    """Whether this process is the only one or the first of several."""
    return int(os.environ.get("RANK", "0")) == 0


def say(line: str) -> None:
    """Print a line, once for all processes."""
    if is_first_process():
        typer.echo(line)


def main(config: Annotated[Path, typer.Argument(help="YAML file with the settings.")]) -> None:
    """Train an encoder on tasks of GLUE under several variants and seeds."""
    try:
        settings = GlueSettings.from_yaml(config)
        for _, training in settings.trainings():
            finished(training)
    except (TypeError, ValueError, NotImplementedError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    transformers.logging.set_verbosity_error()  # such as what is new in every head
    transformers.logging.disable_progress_bar()
    start = time.time()
    results = run(settings)
    say(f"\n{table(results)}\n{time.time() - start:.0f} s. Wrote results.json and table.md to {settings.output}.")


if __name__ == "__main__":
    typer.run(main)
