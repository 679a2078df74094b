"""What answers lose where keys are left out: the same prompts for the dense model and every method, in pairs.

    python benchmarks/answers.py run selection DIR --text FILE
    python benchmarks/answers.py run caches DIR --text FILE --longbench FOLDER
    python benchmarks/answers.py page selection DIR

`run` takes one prompt after the other through all methods, so that it may be stopped at any time, and goes on where it
was; rows are in `docs/results/selection` and `docs/results/caches`. `STAGES` has the order, the most wanted first.
"""

import sys
import time
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent))

from answer_parts import caches_page, rows, selection_page
from answer_parts.baselines import baselines
from answer_parts.cases import CONTINUATION, LONGBENCH, NEEDLES, TEXT, Case, cases
from answer_parts.methods import Method, cache_methods, selection_methods
from answer_parts.scoring import TAIL, Prefixes, When, dense, outcome
from caches import Gates, conditions, loaded, random_gates
from published import SMOL, needed

app = typer.Typer(add_completion=False)

RESULTS = Path(__file__).parents[1] / "docs" / "results"
PAGES = {"selection": selection_page, "caches": caches_page}


@dataclass(frozen=True)
class Stage:
    """Prompts that are asked under some of the settings.

    Attributes:
        tasks: in turn.
        length: of prompts, in tokens.
        numbers: of prompts.
        places: of settings in `Method.asked`.
    """

    tasks: tuple[str, ...]
    length: int
    numbers: range
    places: tuple[int, ...]


_NEEDLES = tuple(NEEDLES)
STAGES = {
    "selection": (
        Stage(_NEEDLES[:2], 1024, range(3), (0,)),
        Stage((TEXT,), 1024, range(3), (0,)),
        Stage(_NEEDLES[:2], 1024, range(3), (1,)),
        Stage((*_NEEDLES[:2], TEXT), 1024, range(3, 6), (0,)),
        Stage(_NEEDLES[2:], 1024, range(6), (0,)),
        Stage(_NEEDLES[:2], 1024, range(2), (2, 3)),
        Stage(_NEEDLES[:2], 2048, range(2), (0,)),
        Stage((TEXT,), 1024, range(3), (1,)),
        Stage(_NEEDLES[:2], 4096, range(1), (0,)),
        Stage(_NEEDLES[:2], 1024, range(3), (2, 3)),
        Stage((*_NEEDLES[:2], TEXT), 2048, range(3), (0,)),
        Stage((*_NEEDLES[:2], TEXT), 1024, range(4), (1, 2, 3)),
        Stage((*_NEEDLES, TEXT), 1024, range(6), (0, 1, 2, 3)),
        Stage((*_NEEDLES, TEXT), 2048, range(6), (0, 1)),
        Stage(_NEEDLES[:2], 4096, range(3), (0, 1)),
        Stage((*_NEEDLES, TEXT), 1024, range(6, 24), (0, 1)),
        Stage((*_NEEDLES, TEXT), 2048, range(6), (2, 3)),
        Stage(_NEEDLES[:1], 8128, range(2), (0, 1)),
    ),
    "caches": (
        Stage((*_NEEDLES[:2], CONTINUATION), 1024, range(6), (0,)),
        Stage((*_NEEDLES[:2], CONTINUATION), 1024, range(6), (1,)),
        Stage(_NEEDLES[2:], 1024, range(2), (0, 1)),
        Stage(LONGBENCH, 2048, range(2), (0,)),
        Stage((*_NEEDLES[:2], CONTINUATION), 1024, range(3), (2,)),
        Stage((CONTINUATION,), 2048, range(2), (0, 1)),
        Stage(LONGBENCH, 2048, range(4), (0,)),
        Stage((*_NEEDLES, CONTINUATION), 1024, range(6), (0, 1, 2)),
        Stage((CONTINUATION,), 2048, range(4), (0, 1, 2)),
        Stage(LONGBENCH, 2048, range(6), (0, 1, 2)),
        Stage((*_NEEDLES, CONTINUATION), 1024, range(6, 24), (0, 1, 2)),
        Stage(LONGBENCH, 2048, range(6, 12), (0, 1, 2)),
    ),
}


def wanted(page: str, methods: list[Method], case: Case, places: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    """Names of outcomes of a case, and the method, its settings and when a cache is compressed; `None`: dense."""
    yield "dense", None
    is_text = case.task == TEXT
    for method in methods:
        if (is_text and method.text is None) or (method.dear and (case.length > 1024 or case.index > 1)):
            continue
        for place in places:
            if place >= len(method.asked):
                continue
            asked = method.asked[place]
            both = page == "caches" and case.task in NEEDLES and method.how != "rows"
            moments: tuple[When, ...] = ("with", "before") if both else ("with",)
            for when in moments:
                known = len(case.prompt if when == "with" else case.text)
                settings = method.settings(asked, case.length if is_text else known)
                if settings is None:
                    continue
                if case.in_one_call:
                    settings = {**settings, **(method.text or {})}
                yield f"{method.name} {asked:g}" + (f" {when}" if page == "caches" else ""), (method, settings, when)


def answered(
    page: str, model: Any, methods: list[Method], case: Case, places: tuple[int, ...], known: Set[str]
) -> rows.Outcomes:
    """What is not known yet of a case, by name."""
    before_answer = len(case.prompt) - 1 if page == "selection" else len(case.text) - TAIL
    prefixes, found = Prefixes(model, case, known=0 if case.task == TEXT else before_answer), {}
    for name, how in wanted(page, methods, case, places):
        if name in known:
            continue
        found[name] = dense(model, case, prefixes) if how is None else outcome(model, case, prefixes, *how)
    return found


def gates_of(model: Any, folder: Path) -> dict[str, Gates | str]:
    """DuoAttention's: drawn, and learned ones if there are any."""
    found: dict[str, Any] = {"random gates": random_gates(model)}
    for path in sorted(folder.glob("duo_*.json")):
        found["learned gates"] = str(path)
    return found


@app.command()
def run(
    page: Annotated[str, typer.Argument(help="'selection' or 'caches'.")],
    model: Annotated[Path, typer.Argument(help="Folder of a causal language model.", default_factory=needed(SMOL))],
    folder: Annotated[Path | None, typer.Option(help="Folder for rows; a run goes on from those there.")] = None,
    text: Annotated[str | None, typer.Option(help="Text for needles and losses; without it, no losses.")] = None,
    longbench: Annotated[str | None, typer.Option(help="Folder with LongBench's files.")] = None,
    minutes: Annotated[float, typer.Option(help="Begin no further prompt after so much processor time.")] = 1e9,
    dtype: Annotated[str, typer.Option(help="Type of weights and cache.")] = "bfloat16",
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
) -> None:
    """Answer prompts."""
    if page not in PAGES:
        raise typer.BadParameter(f"expected one of {', '.join(PAGES)}, got {page!r}.")
    folder = RESULTS / page if folder is None else folder
    base, tokenizer, path = (
        loaded(model, dtype, threads),
        AutoTokenizer.from_pretrained(model),
        folder / "answers.jsonl",
    )
    methods = selection_methods() if page == "selection" else cache_methods(gates_of(base, folder))
    with baselines():
        for stage in STAGES[page]:
            for case in cases(tokenizer, stage.tasks, stage.length, stage.numbers, text, longbench):
                if time.process_time() > 60 * minutes:
                    print(f"Time is up before {case.key}: the next start goes on there.")
                    return
                known = set(rows.read(path).get(case.key, ()))
                start = time.process_time()
                if found := answered(page, base, methods, case, stage.places, known):
                    rows.append(path, case.key, found)
                    print(case.key, len(found), f"{time.process_time() - start:.0f} s", flush=True)


@app.command()
def page(
    page: Annotated[str, typer.Argument(help="'selection' or 'caches'.")],
    model: Annotated[Path, typer.Argument(help="Folder of the model that answered.", default_factory=needed(SMOL))],
    folder: Annotated[Path | None, typer.Option(help="Folder with rows.")] = None,
    output: Annotated[Path | None, typer.Option(help="Markdown file to write, pictures beside it.")] = None,
    dtype: Annotated[str, typer.Option(help="Type of weights and cache.")] = "bfloat16",
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
) -> None:
    """Write what there is into a page."""
    folder = RESULTS / page if folder is None else folder
    output = RESULTS / f"{page}.md" if output is None else output
    found = rows.read(folder / "answers.jsonl")
    lines = PAGES[page].lines(found, conditions(loaded(model, dtype, threads), dtype, threads), output, folder)
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
