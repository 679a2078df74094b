"""Trained selections against dense attention at equal training: associative recall from random weights.

    python benchmarks/recall.py --folder docs/results/selection

A Llama of two layers, patched before its first step, learns to answer keys of a list with their values: for each method
and seed the same start and batches. A run goes on where it was stopped; `answers.py page selection` shows its rows.
"""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import patchattn
from patchattn.demo.tasks import RecallTask
from patchattn.demo.training import fit
from patchattn.training import optimizer_groups

sys.path.insert(0, str(Path(__file__).parent))

from answer_parts.recall_rows import NAME, READ
from paired_rows import append_row, read_rows

app = typer.Typer(add_completion=False)

BLOCK = 4
_COMPRESSED = {"block": BLOCK, "length": BLOCK, "stride": BLOCK // 2, "first": 1, "local": 1, "top_k": READ // BLOCK}
# each reads READ keys of up to 32
METHODS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "dense": None,
    "moba": ("moba", {"block": BLOCK, "top_k": READ // BLOCK, "decode": "selected"}),
    "nsa": ("nsa", {**_COMPRESSED, "window": BLOCK}),
    "dma": ("dma", {"window": READ}),
    "nosa": ("nosa", {**_COMPRESSED, "aware": 2}),
    "streaming": ("streaming", {"sinks": 1, "recent": READ - 1}),
}


class Recall(RecallTask):
    """Eight pairs, 32 tokens."""

    pairs = 8


def trained(name: str, seed: int, steps: int) -> dict[str, Any]:
    """Right answers in percent, and the mean loss of the last steps."""
    task = Recall()
    model = task.new_model(seed)
    how = METHODS[name]
    if how is not None:
        torch.manual_seed(seed)
        patchattn.patch_model(model, *how)
    losses: list[float] = []
    groups = optimizer_groups(model, task.base_learning_rate)
    fit(model, task.train_batches(seed + 1, steps), steps, groups, losses.append)
    with torch.no_grad():
        answers = [task.score(model(batch["input_ids"]).logits, batch["labels"]) for batch in task.test_batches()]
    right, asked = (sum(each[n] for each in answers) for n in (0, 1))
    last = losses[-50:]
    return {"right": round(100 * right / asked, 2), "loss": round(sum(last) / len(last), 4)}


@app.command()
def main(
    folder: Annotated[Path, typer.Option(help="Folder for rows; a run goes on from those there.")],
    seeds: Annotated[int, typer.Option(help="Models of each method.")] = 5,
    steps: Annotated[int, typer.Option(help="Steps of each.")] = 1200,
    minutes: Annotated[float, typer.Option(help="Begin no further model after so much processor time.")] = 1e9,
) -> None:
    """Train what is not there yet."""
    torch.set_num_threads(1)
    path = folder / NAME
    for seed in range(seeds):
        for name in METHODS:
            key, start = f"{name}/{seed}/{steps}", time.process_time()
            if key in read_rows(path):
                continue
            if start > 60 * minutes:
                print(f"Time is up before {key}: the next start goes on there.")
                return
            row = trained(name, seed, steps)
            append_row(path, key, row)
            print(key, row, f"{time.process_time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    app()
