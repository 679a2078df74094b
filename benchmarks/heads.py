"""What heads do in a real model: parts of a results page, each resumable, compared in pairs with the dense model.

    python benchmarks/heads.py DIR --text FILE --folder runs/heads --minutes 60 --output docs/results/heads.md

`DIR` holds a causal language model such as SmolLM2-135M-Instruct, `FILE` plain text such as WikiText-2's validation
set. Rollout needs `--encoder` and `--sentences` besides, cross attention `--speech` and the program espeak-ng. A run
goes on where it was stopped; with `--minutes 0` it only writes the page of what there is. Figures are of quality alone,
so a busy machine does not matter. A new part is a module of `heads_parts` and its name in `PARTS`.
"""

import datetime
import platform
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import patchattn

sys.path.insert(0, str(Path(__file__).parent))
from heads_parts import (
    codes,
    contrast,
    dates,
    directions,
    lookback,
    maps,
    masking,
    massive,
    memory,
    places,
    retrieval,
    rollout,
    speech,
)
from heads_parts.common import Part, Setup
from published import SMOL, WHISPER, if_there, needed

PARTS: tuple[Part, ...] = (
    *(retrieval, masking, contrast, lookback, massive, rollout, speech),
    *(places, memory, dates, maps, directions, codes),
)

app = typer.Typer(add_completion=False)


def in_turn(setup: Setup, parts: tuple[Part, ...]) -> list[tuple[Part, str, Any]]:
    """Jobs of one stage: each part is at the same share of its own all the time, so that one can stop at any time."""
    shares = []
    for part in parts:
        jobs = part.jobs(setup)
        shares += [((number + 1) / len(jobs), part, *job) for number, job in enumerate(jobs)]
    return [job for _, *job in sorted(shares, key=lambda share: share[0])]


def measure(setup: Setup, parts: tuple[Part, ...], minutes: float) -> None:
    """Do what is not done yet, and begin nothing after so many minutes."""
    end = time.time() + 60 * minutes
    for stage in sorted({part.STAGE for part in parts}):
        jobs = in_turn(setup, tuple(part for part in parts if stage == part.STAGE))
        done = {(part.NAME, key) for part in parts for key in setup.rows(part.NAME)}
        left = [(part, key, run) for part, key, run in jobs if (part.NAME, key) not in done]
        for part, key, run in tqdm(left, desc=f"stage {stage}", initial=len(jobs) - len(left), total=len(jobs)):
            if time.time() >= end:
                print(f"Time is up before {part.NAME} {key}: the next start goes on there.")
                return
            setup.write(part.NAME, key, run())


def page(setup: Setup, parts: tuple[Part, ...], about: str, pictures: Path | None) -> str:
    """The page of what has been measured so far, and what has not."""
    lines = ["# What heads do in SmolLM2-135M", "", about, ""]
    for part in parts:
        if setup.rows(part.NAME):
            lines += [*part.section(setup, pictures), ""]
    states = []
    for part in parts:
        count, total = len(setup.rows(part.NAME)), len(part.jobs(setup))
        states.append(f"{part.NAME} {count} of {total} rows")
    lines += ["## How far it went", "", f"{'; '.join(states)}.", ""]
    return "\n".join(lines)


@app.command()
def main(
    model: Annotated[Path, typer.Argument(help="Folder of a causal language model.", default_factory=needed(SMOL))],
    text: Annotated[Path, typer.Option(help="File of plain text: for perplexity, and to hide needles in.")],
    folder: Annotated[Path, typer.Option(help="Folder for rows; a run goes on from those that are there.")],
    speech: Annotated[
        Path | None,
        typer.Option(help="Folder of whisper-tiny.en, for cross attention.", default_factory=if_there(WHISPER)),
    ],
    samples: Annotated[int, typer.Option(help="Prompts of each length, and texts.", min=1)] = 16,
    length: Annotated[list[int] | None, typer.Option(help="Tokens of prompts with a needle; 1024 and 2048.")] = None,
    encoder: Annotated[Path | None, typer.Option(help="Folder of an encoder, such as MiniLM, for rollout.")] = None,
    sentences: Annotated[Path | None, typer.Option(help="Folder of SST-2's train.tsv and dev.tsv.")] = None,
    minutes: Annotated[float, typer.Option(help="Begin nothing new after so long; 0: only the page.")] = 1e9,
    part: Annotated[list[str] | None, typer.Option(help="Parts; all by default.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of torch.", min=1)] = 1,
    note: Annotated[str, typer.Option(help="What the page is to say of the model and the text besides.")] = "",
    output: Annotated[Path | None, typer.Option(help="Markdown file to write; pictures go beside it.")] = None,
) -> None:
    """Measure what heads do, and write the page."""
    names = {each.NAME: each for each in PARTS}
    if unknown := [name for name in part or () if name not in names]:
        raise typer.BadParameter(f"There are the parts {', '.join(names)}, got {unknown[0]}.")
    chosen = PARTS if part is None else tuple(names[name] for name in part)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    given: dict[str, Any] = {"encoder": encoder, "sentences": sentences, "speech": speech}
    given |= {} if length is None else {"lengths": tuple(length)}
    setup = Setup(base, AutoTokenizer.from_pretrained(model), text, folder, samples, **given)
    measure(setup, chosen, minutes)
    about = (
        f"{datetime.date.today()}, {platform.machine()}, {threads} thread(s), Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, patchattn {patchattn.__version__}. "
        f"{type(base).__name__}, {sum(p.numel() for p in base.parameters()) / 1e6:.0f} M parameters, float32. "
        f"{note}\n\n`python benchmarks/heads.py DIR --text FILE --folder ROWS --samples {samples}`, from the rows that "
        "are there. A difference is called shown if it is more than two standard errors from zero. An error of 0 means "
        "that all pairs came out alike, not that the size is exact: the numbers of prompts are small."
    )
    found = page(setup, PARTS, about, None if output is None else output.parent)
    print(found)
    if output is not None:
        output.write_text(found, encoding="utf-8")


if __name__ == "__main__":
    app()
