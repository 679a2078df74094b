"""What is left of a model as its query heads are taken out, the least important first, by several measures.

    python benchmarks/pruning_curves.py glue runs/glue --data glue --output docs/results/pruning_minilm
    python benchmarks/pruning_curves.py stories models/stories260K --data text --output docs/results/pruning_stories260k

The first takes classifiers that `recipes/finetune_glue.py` trained with `keep_models: true`, the second a small
language model. Each writes tables as Markdown, all points as JSON, and pictures. What was measured is kept in the JSON:
a run that was killed goes on.
"""

import functools
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers as tf
import typer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import patchattn
from patchattn.calibration.pruning_curve import CurvePoint, accuracy, perplexity, pruning_curve
from patchattn.evaluation.tasks.glue import glue_task, load_glue
from patchattn.plotting import plot_pruning_curve

app = typer.Typer()
Batches = list[dict[str, Any]]
# Method to its name, and whether it looks at data.
METHODS = {"michel": ("Michel", True), "flap": ("FLAP", True), "amp": ("AMP", True), "magnitude": ("magnitude", False)}
SEEDS = (0, 1, 2)  # of the random scores
STEP, LAST = 0.1, 0.7  # shares of the heads


class Notes:
    """Curves by name, kept in a file as they are measured."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        self.curves: dict[str, list[CurvePoint]] = {}
        if path.is_file():
            content = json.loads(path.read_text())
            if content["about"] != about:
                raise ValueError(
                    f"{path} is of another measurement: {content['about']}. Delete it, or write elsewhere."
                )
            self.curves = {
                name: [CurvePoint(**point) for point in points] for name, points in content["curves"].items()
            }

    def measure(self, name: str, run: Callable[[], Sequence[CurvePoint]]) -> list[CurvePoint]:
        """The curve of that name, run if it is not there."""
        if name not in self.curves:
            start = time.time()
            self.curves[name] = list(run())
            curves = {key: [asdict(point) for point in points] for key, points in self.curves.items()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"about": self.about, "curves": curves}) + "\n")
            values = " ".join(f"{point.value:.3f}" for point in self.curves[name])
            typer.echo(f"{name}: {values} ({time.time() - start:.0f} s)")
        return self.curves[name]


def measured(
    notes: Notes, prefix: str, model: Any, batches: Batches, evaluate: Callable[[Any], float]
) -> dict[str, list[CurvePoint]]:
    """One curve per method; of random scores the mean over seeds."""
    total = sum(site.query_heads or 0 for site in patchattn.find_sites(model))
    how = {"every": round(total * STEP), "until": LAST, "recompute": False, "physical": True}

    def curve(method: str, **options: Any) -> Callable[[], list[CurvePoint]]:
        given = batches if METHODS.get(method, (None, False))[1] else []
        return functools.partial(pruning_curve, model, given, evaluate, method=method, **options, **how)

    curves: dict[str, list[CurvePoint]] = {}
    for method, (name, _) in METHODS.items():
        curves[name] = notes.measure(f"{prefix}{name}", curve(method))
    drawn = [notes.measure(f"{prefix}random {seed}", curve("random", seed=seed)) for seed in SEEDS]
    curves[f"random, mean of {len(SEEDS)}"] = [
        CurvePoint(points[0].removed, points[0].sparsity, statistics.fmean(point.value for point in points), {})
        for points in zip(*drawn, strict=True)
    ]
    return curves


def about(**facts: Any) -> dict[str, Any]:
    """What a measurement depends on."""
    versions = {"torch": torch.__version__, "transformers": tf.__version__, "patchattn": patchattn.__version__}
    return {**facts, **versions, "machine": platform.machine(), "device": "cpu"}


def rows(curves: Mapping[str, Sequence[CurvePoint]], scale: float, digits: int) -> list[str]:
    """A Markdown table: a row per curve, a column per number of heads removed."""
    first = next(iter(curves.values()))
    head = ["heads removed", *(f"{point.removed} ({point.sparsity:.0%})" for point in first)]
    lines = [head, ["---", *["---:"] * len(first)]]
    lines += [[name, *(f"{scale * point.value:.{digits}f}" for point in points)] for name, points in curves.items()]
    return [f"| {' | '.join(line)} |" for line in lines]


def write(output: Path, parts: list[str]) -> None:
    output.with_suffix(".md").write_text("\n".join(parts) + "\n", encoding="utf-8")
    typer.echo("\n".join(parts))


@app.command()
def glue(
    models: Annotated[Path, typer.Argument(help="Output folder of finetune_glue.py: TASK/RUN/seed_0.")],
    data: Annotated[Path, typer.Option(help="Folder with one folder per task.")],
    output: Annotated[Path, typer.Option(help="Where to write, without a suffix.")],
    run: Annotated[str, typer.Option(help="Name of the run's folder.")] = "dense",
    tasks: Annotated[str, typer.Option(help="Tasks, by commas.")] = "sst2,mrpc,rte",
    scored_rows: Annotated[int, typer.Option(help="Training rows that importance is scored on.")] = 512,
    test_rows: Annotated[int, typer.Option(help="Rows to evaluate on, at most.")] = 872,
    length: Annotated[int, typer.Option(help="Tokens of a row, at most.")] = 128,
) -> None:
    """Accuracy of fine-tuned encoders."""
    notes = Notes(output.with_suffix(".json"), about(tasks=tasks, scored_rows=scored_rows, test_rows=test_rows))
    parts: list[str] = []
    for task in tasks.split(","):
        folder = models / task / run / "seed_0"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        known, unseen = load_glue(task, data)
        train = glue_batches(task, known, tokenizer, length, scored_rows)
        test = glue_batches(task, unseen, tokenizer, length, test_rows)
        count = sum(len(batch["labels"]) for batch in test)
        curves = measured(notes, f"{task} ", model, train, lambda one, test=test: accuracy(one, test))
        parts += [f"**{task}**, accuracy in percent on {count} rows", "", *rows(curves, 100, 1), ""]
        figure = plot_pruning_curve(scaled(curves), metric="accuracy, %", title=f"MiniLM on {task}")
        figure.savefig(output.with_name(f"{output.name}_{task}.png"), dpi=120)
    write(output.with_name(f"{output.name}_tables"), parts)


def glue_batches(task: str, rows: Any, tokenizer: Any, length: int, count: int) -> Batches:
    """Rows drawn by a seed, sorted by length, in batches of 32."""
    rows = rows.shuffle(seed=0).select(range(min(count, len(rows))))
    texts = [list(rows[name]) for name in ("sentence1", "sentence2")[: len(glue_task(task).texts)]]
    encoded = tokenizer(*texts, truncation=True, max_length=length)["input_ids"]
    order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
    batches = []
    for start in range(0, len(order), 32):
        chosen = order[start : start + 32]
        inputs = tokenizer(
            *([column[row] for row in chosen] for column in texts),
            truncation=True,
            max_length=length,
            padding=True,
            return_tensors="pt",
        )
        batches.append({**inputs, "labels": torch.tensor([rows["label"][row] for row in chosen])})
    return batches


def scaled(curves: Mapping[str, Sequence[CurvePoint]]) -> dict[str, list[CurvePoint]]:
    """In percent."""
    return {
        name: [CurvePoint(point.removed, point.sparsity, 100 * point.value, {}) for point in points]
        for name, points in curves.items()
    }


@app.command()
def stories(
    model_folder: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a small causal language model.")],
    data: Annotated[Path, typer.Option(help="Folder with both texts.")],
    output: Annotated[Path, typer.Option(help="Where to write, without a suffix.")],
    train_file: Annotated[str, typer.Option(help="Text to score and recover on.")] = "train.txt",
    test_file: Annotated[str, typer.Option(help="Text to evaluate on.")] = "test.txt",
    length: Annotated[int, typer.Option(help="Tokens of a piece.")] = 256,
    steps: Annotated[int, typer.Option(help="Steps of LoRA, on eight pieces each.")] = 60,
) -> None:
    """Perplexity of a language model, and what LoRA recovers at some levels."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    train = pieces(tokenizer, data / train_file, length, 8 * max(steps, 32))
    test = pieces(tokenizer, data / test_file, length, 8 * 40)
    notes = Notes(output.with_suffix(".json"), about(length=length, steps=steps, test_tokens=len(test) * 8 * length))

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(model_folder).eval()

    def evaluate(one: Any) -> float:
        return perplexity(one, test)

    curves = measured(notes, "", load(), train[:32], evaluate)
    recovered = {}
    for name in [name for name in notes.curves if "LoRA" not in name]:
        points = [
            point for point in notes.curves[name] if point.removed == 0 or round(point.sparsity, 1) in (0.3, 0.5, 0.7)
        ]
        recovered[f"{name} + LoRA"] = notes.measure(
            f"{name} + LoRA",
            lambda points=points: [
                CurvePoint(point.removed, point.sparsity, recover(load(), point, train, steps, evaluate), point.heads)
                for point in points
            ],
        )
    parts = ["Perplexity as pruned", "", *rows(curves, 1, 2), "", f"After {steps} steps of LoRA", ""]
    parts += rows(recovered, 1, 2)
    plot_pruning_curve(curves, metric="perplexity", title="stories260K on WikiText-2, as pruned").savefig(
        output.with_name(f"{output.name}.png"), dpi=120
    )
    write(output.with_name(f"{output.name}_tables"), parts)


def pieces(tokenizer: Any, path: Path, length: int, count: int) -> Batches:
    """The first pieces of a text, in batches of eight."""
    ids = torch.tensor(tokenizer(path.read_text(encoding="utf-8"))["input_ids"][: count * length])
    rows = ids[: len(ids) // length * length].view(-1, length)
    return [{"input_ids": batch} for batch in rows.split(8)]


def recover(model: Any, point: CurvePoint, train: Batches, steps: int, evaluate: Callable[[Any], float]) -> float:
    """Perplexity after training LoRA on the pruned model, each batch once; the unpruned model is trained alike."""
    if point.heads:
        patchattn.patch_model(model, "prune", heads={name: list(heads) for name, heads in point.heads.items()})
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=2e-3)
    for batch in train[:steps]:
        tuned(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return evaluate(tuned.eval())


if __name__ == "__main__":
    app()
