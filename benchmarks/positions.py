"""Positions and spans in real models: parts of a results page, each resumable, compared in pairs with the plain model.

    python benchmarks/positions.py --model DIR --stories DIR --text FILE --training FILE --longbench DIR \\
        --glue DIR --folder docs/results/positions --minutes 60 --output docs/results/positions.md

`--model` is a folder of SmolLM2-135M-Instruct, `--stories` one of stories260K, the texts are WikiText-2's: its
validation set to measure on, a part of its training set to train a small Llama on. What is not given is not measured. A
run goes on where it was stopped; with `--minutes 0` it only writes the page of what there is. Figures are of quality
and of operations counted, so a busy machine does not matter; `first-token` measures time, and wants an idle one.
"""

import datetime
import platform
import sys
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer

import patchattn

sys.path.insert(0, str(Path(__file__).parent))
from heads import measure
from heads_parts.common import Part
from positions_parts import demonstrations, documents, far, first_token, length
from positions_parts.common import Setup
from published import SMOL, if_there, needed

PARTS: tuple[Part, ...] = (length, documents, demonstrations, far)

app = typer.Typer(add_completion=False)
Model = Annotated[Path | None, typer.Option(help="Folder of SmolLM2-135M-Instruct.", default_factory=if_there(SMOL))]
Text = Annotated[Path, typer.Option(help="File of plain text to measure on.")]
Folder = Annotated[Path, typer.Option(help="Folder for rows; a run goes on from those that are there.")]


def page(setup: Setup, about: str, pictures: Path | None) -> str:
    """The page of what has been measured so far, and what has not."""
    lines = ["# Positions and spans", "", about, ""]
    states = []
    for part in PARTS:
        lines += [*part.section(setup, pictures), ""]
        count, total = len(setup.rows(part.NAME)), len(part.jobs(setup))
        states.append(f"{part.NAME} {count} of {total} rows")
    lines += [*first_token.section(setup), ""]
    return "\n".join([*lines, "## How far it went", "", f"{'; '.join(states)}.", ""])


@app.command()
def run(
    text: Text,
    folder: Folder,
    model: Model,
    stories: Annotated[Path | None, typer.Option(help="Folder of stories260K.")] = None,
    training: Annotated[Path | None, typer.Option(help="File of plain text to train a small Llama on.")] = None,
    longbench: Annotated[
        Path | None, typer.Option(help="Folder with LongBench's hotpotqa.json, as MiniLongBench.")
    ] = None,
    glue: Annotated[Path | None, typer.Option(help="Folder with GLUE's SST-2.")] = None,
    models: Annotated[
        Path | None, typer.Option(help="Folder for the small Llama; that of the rows by default.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Rows and prompts of each kind.", min=1)] = 16,
    seeds: Annotated[int, typer.Option(help="How many small Llamas.", min=1)] = 1,
    minutes: Annotated[float, typer.Option(help="Begin nothing new after so long; 0: only the page.")] = 1e9,
    part: Annotated[list[str] | None, typer.Option(help="Parts to measure; all by default.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of torch.", min=1)] = 1,
    output: Annotated[Path | None, typer.Option(help="Markdown file to write; pictures go beside it.")] = None,
) -> None:
    """Measure what positions and spans do, and write the page."""
    names = {each.NAME: each for each in PARTS}
    if unknown := [name for name in part or () if name not in names]:
        raise typer.BadParameter(f"There are the parts {', '.join(names)}, got {unknown[0]}.")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    given = (model, stories, text, training, longbench, folder, models or folder, samples, tuple(range(seeds)), glue)
    setup = Setup(*given)
    measure(setup, tuple(each for each in PARTS if part is None or each.NAME in part), minutes)
    about = (
        f"{datetime.date.today()}, {platform.machine()}, {threads} thread(s), Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, patchattn {patchattn.__version__}, "
        "float32 unless it is said otherwise. SmolLM2-135M-Instruct was unpacked from a Q4_1 file, so figures are of "
        "that file.\n\n`python benchmarks/positions.py run --model DIR --stories DIR --text FILE --training FILE "
        f"--longbench DIR --glue DIR --folder ROWS --samples {samples} --seeds {seeds}`, from the rows that are there, "
        "which are in `docs/results/positions`. A difference is called shown if it is more than two standard errors "
        "from zero."
    )
    found = page(setup, about, None if output is None else output.parent)
    print(found)
    if output is not None:
        output.write_text(found, encoding="utf-8")


@app.command("first-token")
def first_token_(
    model: Annotated[Path, typer.Argument(help="Folder of SmolLM2-135M-Instruct.", default_factory=needed(SMOL))],
    folder: Folder,
    repeats: Annotated[int, typer.Option(help="Timed rounds; one more warms up.", min=1)] = 5,
) -> None:
    """Time to the first token behind 10 and 20 documents, all of the prompt and with the documents stored, in ms of one
    thread's processor time. Run it on an idle machine."""
    torch.set_num_threads(1)
    first_token.measure(Setup(model, None, Path(), None, None, folder, folder, 1), (10, 20), repeats)


if __name__ == "__main__":
    app()
