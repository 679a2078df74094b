"""Measuring the rows of a board, one after the other; a killed run goes on where it was."""

import datetime
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from ...core.info import patch_info
from ...core.observation import observe
from ...core.patching import is_patched, unpatched
from ...core.report import Observation
from ...files.documents import as_json, read_json_object, write_json
from ..report.errors import standard_error
from ..report.report import surroundings
from ..run.compare import answers, evaluate, patched_run, processes
from ..tasks.speed import SpeedTask
from ..tasks.task import EvalTask, Row
from .plan import DENSE, BoardPlan, BoardRow

ROWS, ANSWERS = "rows", "answers"


def run_board(
    model: Any,
    tokenizer: Any,
    plan: BoardPlan,
    rows: Mapping[str, BoardRow],
    output: Path,
    *,
    data: Path | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Measure the unpatched model and every row that is not there yet.

    Answers are kept batch by batch in `answers/<row>`, a finished row in `rows/<row>.json`: scores, their differences
    to dense on the same samples with standard errors, speed in turn with dense, what of the cache and of its keys was
    used, parameters, commit, versions, seed and machine. A task that refuses a row, or a row that the model cannot
    have, is said there with the reason.

    Args:
        model: unpatched, in evaluation mode.
        tokenizer: of the model.
        plan: the work.
        rows: by name.
        output: folder.
        data: folder with the tasks' data; the Hub without.
        say: told of every row that begins.

    Raises:
        ValueError: a patched model, an output folder of another board, or what a task says of the unpatched model.
        TypeError: a setting of the wrong type.
    """
    if is_patched(model):
        raise ValueError("A board needs an unpatched model: its rows say what it is patched with.")
    state, tasks = processes(), plan.made_tasks(data)
    for number, name in enumerate([DENSE, *rows]):
        path = output / ROWS / f"{name}.json"
        row = None if name == DENSE else rows[name]
        what = as_json({"plan": plan.to_dict(), "row": None if row is None else row.to_dict()})
        if path.is_file():
            if (before := read_json_object(path)).get("measured") != what:
                raise ValueError(f"{path} was measured by another plan or as another row. Choose another output.")
            say(f"{number}/{len(rows)} {name}: is there, of {before.get('date')}")
            continue
        say(f"{number}/{len(rows)} {name}")
        found = _measure(model, tokenizer, plan, tasks, row, name, output)
        if state.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, as_json({"name": name, "measured": what, **found}))
        state.wait_for_everyone()


def _measure(
    model: Any,
    tokenizer: Any,
    plan: BoardPlan,
    tasks: Sequence[EvalTask],
    row: BoardRow | None,
    name: str,
    output: Path,
) -> dict[str, Any]:
    where = {
        "date": str(datetime.date.today()),
        "commit": _commit(),
        "seed": plan.seed,
        **surroundings(model),
    }

    def way() -> AbstractContextManager[Any]:
        return nullcontext() if row is None else patched_run(model, row.run, plan.seed)

    try:
        with way():
            info = patch_info(model)
            parameters = sum(weight.numel() for weight in model.parameters())
    except (NotImplementedError, ValueError) as error:
        return {**where, "refused": str(error)}
    found: dict[str, Any] = {"parameters": parameters, "extra_parameters": info["extra_parameters"], "tasks": {}}
    with way():
        for task in tasks:
            try:
                task.check_model(model, tokenizer)
            except ValueError as error:
                if row is None:
                    raise
                found["tasks"][task.name] = {"refused": str(error)}
                continue
            found["tasks"][task.name] = _scores(model, tokenizer, plan, task, name, output)
        found["density"] = None if row is None else _density(model, tokenizer, plan.speed_task())
    found["speed"] = None if row is None else _speed(model, tokenizer, plan, way)
    return {**where, **found}


def _scores(model: Any, tokenizer: Any, plan: BoardPlan, task: EvalTask, name: str, output: Path) -> dict[str, Any]:
    settings = {"batch": plan.batch, "seed": plan.seed, "limit": plan.limit(task.name)}
    found = evaluate(model, tokenizer, [task], output / ANSWERS / name, **settings)[task.name]
    samples = found["samples"]

    def given(run: str) -> list[Row]:
        return answers(output / ANSWERS / run, task.name, samples, plan.batch)

    rows, score = given(name), found["scores"][task.main_score]
    content = {
        "samples": samples,
        "score": score,
        "error": standard_error(task, rows),
        "unit": task.unit,
        "higher_is_better": task.higher_is_better,
        "scores": found["scores"],
        "cache_ratio": found["costs"].get("cache_ratio"),
    }
    if name != DENSE:
        dense = given(DENSE)
        content["difference"] = None if score is None else score - task.score(dense)[task.main_score]
        content["difference_error"] = standard_error(task, rows, dense)
    return content


def _density(model: Any, tokenizer: Any, task: SpeedTask) -> float | None:
    """Mean of the shares of keys that layers report to have read, prompt and answer of one run; None if none does."""
    shares: list[float] = []

    def note(observation: Observation) -> None:
        if (density := observation.values.get("density")) is not None:
            shares.append(float(density.mean()))

    with observe(model, note):
        task.answer(model, tokenizer, [0])
    return statistics.mean(shares) if shares else None


def _speed(
    model: Any, tokenizer: Any, plan: BoardPlan, way: Callable[[], AbstractContextManager[Any]]
) -> dict[str, dict[str, float]]:
    """Medians of each, dense and patched in turn, the first of both left out; and the ratios of the medians."""
    task, rounds = plan.speed_task(), plan.repeats + 1
    everything = range(len(task))
    dense, patched = [], []
    with way():
        for _ in range(rounds):
            with unpatched(model):
                dense.append(task.answer(model, tokenizer, everything))
            patched.append(task.answer(model, tokenizer, everything))
    slow, fast = (_medians(task, runs[1:]) for runs in (dense, patched))
    return {
        "dense": slow,
        "patched": fast,
        "ratio": {
            "prefill": slow["first_token_seconds"] / fast["first_token_seconds"],
            "decode": fast["tokens_per_second"] / slow["tokens_per_second"],
        },
    }


def _medians(task: SpeedTask, runs: Sequence[Sequence[Row]]) -> dict[str, float]:
    scores = [task.score(rows) for rows in runs]
    return {
        key: statistics.median(score[key] for score in scores) for key in ("first_token_seconds", "tokens_per_second")
    }


def _commit() -> str | None:
    """Of the checkout that this patchattn is run from; None where it is installed, in whose checkout ever."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None
