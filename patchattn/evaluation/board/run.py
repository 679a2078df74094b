"""Measuring the rows of a board, one after the other; a killed run goes on where it was."""

import datetime
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

from ...core.info import patch_info
from ...core.observation import observe
from ...core.patching import is_patched
from ...core.report import Observation
from ...files.documents import as_json, read_json_object, write_json
from ...saving.trained import adapter_tensors, holds_adapter, holds_patch, own_parameters
from ..report.errors import standard_error
from ..report.report import surroundings
from ..run.compare import answers, evaluate, patched_run, processes
from ..tasks.prefixes import Prefixes
from ..tasks.task import EvalTask, Row
from .plan import DENSE, BoardPlan, BoardRow
from .speed import row_speed

Part = Literal["quality", "speed"]
ROWS, SPEED, ANSWERS, PREFIXES = "rows", "speed", "answers", "prefixes"


def run_board(
    model: Any,
    tokenizer: Any,
    plan: BoardPlan,
    rows: Mapping[str, BoardRow],
    output: Path,
    *,
    only: Part | None = None,
    data: Path | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Measure the unpatched model and every row that is not there yet.

    Answers are kept batch by batch in `answers/<row>`, a finished row in `rows/<row>.json`: scores, their differences
    to dense on the same samples with standard errors, what of the cache and of its keys was used, parameters, commit,
    versions, seed and machine. Times, in turn with dense, are in `speed/<row>.json`, which may be measured alone and on
    another day, when nothing else is running. A task that refuses a row, or a row that the model cannot have, is said
    there with the reason. What the unpatched model has read for rows that act behind a prompt is in `prefixes`, and may
    be removed at any time.

    Several processes (of `accelerate launch`, say) share the samples of each task, and the first of them measures the
    times while the others wait.

    Args:
        model: unpatched, in evaluation mode.
        tokenizer: of the model.
        plan: the work.
        rows: by name.
        output: folder.
        only: quality: no times; speed: times alone.
        data: folder with the tasks' data; the Hub without.
        say: told of every row that begins.

    Raises:
        ValueError: a patched model, an output folder of another board, or what a task says of the unpatched model.
        TypeError: a setting of the wrong type.
    """
    if is_patched(model):
        raise ValueError("A board needs an unpatched model: its rows say what it is patched with.")
    state, tasks = processes(), plan.made_tasks(data)

    def quality(row: BoardRow | None, name: str) -> dict[str, Any]:
        shares = row is None or row.behind_prompt
        prefixes = Prefixes(output / PREFIXES) if shares else None
        for task in tasks:
            task.prefixes = prefixes
        return _quality(model, tokenizer, plan, tasks, row, name, output)

    def speed(row: BoardRow | None, name: str) -> dict[str, Any]:
        return row_speed(model, tokenizer, plan, row) if row is not None and state.is_main_process else {}

    parts: list[tuple[str, Any, dict[str, Any]]] = []
    if only != "speed":
        parts.append((ROWS, quality, plan.work))
    if only != "quality":
        parts.append((SPEED, speed, plan.speed))
    for number, name in enumerate([DENSE, *rows]):
        row = None if name == DENSE else rows[name]
        for kind, measure, work in parts:
            if row is None and kind == SPEED:
                continue
            path, about = output / kind / f"{name}.json", f"{number}/{len(rows)} {name}, {kind}"
            what = as_json({"plan": work, "row": None if row is None else row.identity()})
            is_there = path.is_file()
            state.wait_for_everyone()  # all have looked: a row that is refused at once is written at once
            if is_there:
                if not _same((before := read_json_object(path)).get("measured"), what):
                    raise ValueError(f"{path} was measured by another plan or as another row. Choose another output.")
                say(f"{about}: is there, of {before.get('date')}")
                continue
            if row is not None and (why := _not_ready(row, output, kind)):
                say(f"{about}: left out, {why}")
                continue
            say(about)
            about_it = surroundings(model)
            if Path(about_it["model"]["name"]).is_dir():  # a board is for others to read: not where a folder lies here
                about_it["model"]["name"] = Path(about_it["model"]["name"]).resolve().name
            where = {"date": str(datetime.date.today()), "commit": commit(), "seed": plan.seed, **about_it}
            where["processes"] = state.num_processes
            found = measure(row, name)
            if state.is_main_process:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, as_json({"name": name, "measured": what, **where, **found}))
            state.wait_for_everyone()


def _quality(
    model: Any,
    tokenizer: Any,
    plan: BoardPlan,
    tasks: Sequence[EvalTask],
    row: BoardRow | None,
    name: str,
    output: Path,
) -> dict[str, Any]:
    def way() -> AbstractContextManager[Any]:
        return nullcontext() if row is None else patched_run(model, row.run, plan.seed)

    try:
        with way():
            info = patch_info(model)
            parameters = own_parameters(model)
    except (NotImplementedError, ValueError) as error:
        return {"refused": str(error)}
    found: dict[str, Any] = {"parameters": parameters, "extra_parameters": info["extra_parameters"]}
    with way():
        if row is not None and row.behind_prompt and adapter_tensors(model):
            raise ValueError(f"{name}: is said to act behind a prompt, and has an adapter, which acts on all of it.")
        is_asked = is_patched(model) and processes().is_main_process  # several would write one prefix at once
        found["density"] = _density(model, tokenizer, tasks) if is_asked else {}
        found["tasks"] = {}
        for task in tasks:
            if row is not None and row.behind_prompt and not task.generates:
                found["tasks"][task.name] = {"as_dense": True}
                continue
            try:
                task.check_model(model, tokenizer)
            except ValueError as error:
                if row is None:
                    raise
                found["tasks"][task.name] = {"refused": str(error)}
                continue
            beside = None if row is None else row.beside
            found["tasks"][task.name] = _scores(model, tokenizer, plan, task, name, beside, output)
    return found


def _scores(
    model: Any, tokenizer: Any, plan: BoardPlan, task: EvalTask, name: str, beside: str | None, output: Path
) -> dict[str, Any]:
    batch = plan.batch(task.name)
    settings = {"batch": batch, "seed": plan.seed, "limit": plan.limit(task.name)}
    found = evaluate(model, tokenizer, [task], output / ANSWERS / name, warm=True, **settings)[task.name]
    samples = found["samples"]

    def given(run: str) -> list[Row]:
        return answers(output / ANSWERS / run, task.name, samples, batch)

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

    def to(other: list[Row]) -> dict[str, Any]:
        return {
            "difference": None if score is None else score - task.score(other)[task.main_score],
            "difference_error": standard_error(task, rows, other),
        }

    if name != DENSE:
        content |= to(given(DENSE))
    if beside is not None and "score" in read_json_object(output / ROWS / f"{beside}.json")["tasks"].get(task.name, {}):
        content["beside"] = to(given(beside))
    return content


def _not_ready(row: BoardRow, output: Path, part: str) -> str | None:
    """Why a row cannot be measured yet; None where it can."""
    if row.patch is not None:
        try:
            if not (holds_patch(row.patch) or holds_adapter(row.patch)):
                return f"{row.patch} holds neither a patch nor an adapter"
        except ValueError as error:
            return str(error)
    if part == ROWS and row.beside is not None:
        path = output / ROWS / f"{row.beside}.json"
        if not path.is_file() or "refused" in read_json_object(path):
            return f"{row.beside}, which it is compared with, was not measured"
    return None


def _same(before: Any, now: dict[str, Any]) -> bool:
    """Whether a row was measured as it is now; of a folder that is not here only its name is known."""
    if (
        isinstance(before, dict)
        and isinstance(before.get("row"), dict)
        and (now["row"] or {}).get("sha256", "") is None
    ):
        before = before | {"row": before["row"] | {"sha256": None}}
    return bool(before == now)


def _density(model: Any, tokenizer: Any, tasks: Sequence[EvalTask]) -> dict[str, float]:
    """Mean shares of the keys that layers report to have read of one prompt, and behind it; empty where none does."""
    shares: dict[str, list[float]] = {"prompt": [], "decode": []}

    def note(observation: Observation) -> None:
        if (density := observation.values.get("density")) is not None:
            shares["prompt" if density.shape[1] > 1 else "decode"].append(float(density.mean()))

    task = next((task for task in tasks if task.generates), None)
    if task is not None:
        with observe(model, note):
            task.answer(model, tokenizer, [0])
    return {when: statistics.mean(values) for when, values in shares.items() if values}


def commit() -> str | None:
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
