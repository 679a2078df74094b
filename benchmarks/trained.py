"""Variants that are trained: parts of a results page, each resumable, compared in pairs at equal training.

    python benchmarks/trained.py run --model DIR --stories DIR --text FILE --training FILE \\
        --folder docs/results/trained --minutes 60
    python benchmarks/trained.py page --folder docs/results/trained --output docs/results/trained.md

`--model` is a folder of SmolLM2-135M-Instruct, `--stories` one of stories260K, the texts are WikiText-2's: its
validation set to measure on, a part of its training set to train on. What is not given is not measured; small models
from random weights need nothing. A run goes on where it was stopped. Figures are of quality alone, so a busy machine
does not matter. A new part is a module of `trained_parts` and its name in `PARTS`; a new task of small models goes into
`toy_tasks.py` and `toys.py`, a variant that LoRA is trained beside into `ADDED` of `adapted.py`.
"""

import datetime
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

import patchattn

sys.path.insert(0, str(Path(__file__).parent))
from heads import measure
from published import SMOL, if_there
from trained_parts import adapted, conversion, landmarks, toys
from trained_parts.common import Setup

from patchattn.evaluation.report.report import markdown_table

PARTS: tuple[Any, ...] = (toys, conversion, adapted, landmarks)

app = typer.Typer(add_completion=False)
Folder = Annotated[Path, typer.Option(help="Folder for rows; a run goes on from those that are there.")]
Text = Annotated[Path | None, typer.Option(help="File of plain text to measure SmolLM2 on.")]


def page_of(setup: Setup, pictures: Path | None) -> str:
    """The page of what has been measured so far, and what has not."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers, patchattn)}
    lines = [
        "# Variants that are trained",
        "",
        f"{datetime.date.today()}, {platform.machine()}, one thread, Python {platform.python_version()}, "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}. SmolLM2-135M-Instruct was "
        "unpacked from a Q4_1 file, so figures are of that file.",
        "",
        "`python benchmarks/trained.py run --model DIR --stories DIR --text FILE --training FILE --folder "
        "docs/results/trained`, from the rows that are there. The papers train larger models on far more text, most of "
        "them from random weights: what is not shown here may hold there.",
        "",
        "## Claims",
        "",
        "A claim is shown if the 95 % interval of the mean difference of pairs, by Student's t, lies on its side of "
        "zero; sizes have their standard errors. Pairs of texts say how sure a difference of two trained models is, "
        "pairs of seeds what another training would give.",
        "",
    ]
    found = [each for part in PARTS for each in part.claims(setup)]
    lines += [*markdown_table(["claim", "", "size"], [list(each) for each in found], texts=3), ""]
    for part in PARTS:
        lines += [*part.section(setup, pictures), ""]
    return "\n".join(lines)


def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


@app.command()
def run(
    folder: Folder,
    model: Annotated[
        Path | None, typer.Option(help="Folder of SmolLM2-135M-Instruct.", default_factory=if_there(SMOL))
    ],
    stories: Annotated[Path | None, typer.Option(help="Folder of stories260K.")] = None,
    text: Text = None,
    training: Annotated[Path | None, typer.Option(help="File of plain text to train SmolLM2 on.")] = None,
    seeds: Annotated[int, typer.Option(help="Trainings of each kind.", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="Steps of SmolLM2 with LoRA.", min=1)] = 200,
    minutes: Annotated[float, typer.Option(help="Begin nothing new after so long.")] = 1e9,
    part: Annotated[list[str] | None, typer.Option(help="Parts to measure; all by default.")] = None,
) -> None:
    """Train and measure what is not there yet."""
    names = {each.NAME: each for each in PARTS}
    if unknown := [name for name in part or () if name not in names]:
        raise typer.BadParameter(f"There are the parts {', '.join(names)}, got {unknown[0]}.")
    _quiet()
    setup = Setup(model, stories, text, training, folder, seeds, steps)
    measure(setup, tuple(each for each in PARTS if part is None or each.NAME in part), minutes)


@app.command()
def page(
    folder: Folder,
    output: Annotated[Path | None, typer.Option(help="Markdown file to write; pictures go beside it.")] = None,
) -> None:
    """Write the page of the rows that are there."""
    _quiet()
    found = page_of(Setup(None, None, None, None, folder), None if output is None else output.parent)
    print(found)
    if output is not None:
        output.write_text(found, encoding="utf-8")


if __name__ == "__main__":
    app()
