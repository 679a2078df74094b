"""The runner of `patchattn eval`: a model without and with patches on tasks, in one process or several, resumable."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from rich.progress import track
from torch import nn

from ...core.info import patch_info
from ...core.patching import active_chains, is_patched, patch_model, unpatch_model, unpatched
from ...core.selection import base_model, evaluating
from ...core.settings import Settings, option
from ...files.documents import decoded, json_lines
from ...plotting.style import MOST_RUNS
from ...saving.trained import adapter_parameters, adapter_tensors, loaded, own_parameters
from ..report.report import UNPATCHED, make_report, summary, write_report
from ..tasks.cost import cuda_devices
from ..tasks.results import claim, model_identity
from ..tasks.task import EvalTask, Row

Run = Mapping[str, Mapping[str, Any]] | str | os.PathLike[str]

Way = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """What every task of a run shares.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """

    batch: int = option(8, help="Samples that a task answers at once.", minimum=1)
    seed: int = option(0, help="Seed of what a new patch starts from, and of what draws in the model.", minimum=0)
    limit: int | None = option(None, help="Only so many samples of each task, the first ones.", minimum=1)


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[EvalTask],
    output: str | os.PathLike[str],
    *,
    warm: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Scores and costs of a model as it is, patched or not; a run that was killed continues.

    Samples are cut into batches, the same ones however many processes there are (of `accelerate launch`, say), and each
    process takes its share. Answers are appended to `<task>/process_<number>.jsonl` in the output folder as they come,
    which the processes must share; what they were made with lies in `<task>.settings.json`. The first batch of a start
    is answered once more before, so that its times are those of a model that has run, unless it is `warm`.

    Args:
        model: of the kind that the tasks are for; it is put into evaluation mode for the time.
        tokenizer: of the model; a processor for vision-language models.
        tasks: with different names.
        output: folder.
        warm: whether the model has run already, or its times are not asked for.
        settings: fields of `RunSettings`: batch, seed and limit.

    Returns:
        Per name of a task `samples`, `scores` and `costs` (see `patchattn.evaluation.report.report.summary`).

    Raises:
        ValueError: no tasks, a task without samples or twice, a model that a task cannot take, an output folder that
            holds another run (the message names what differs), or one that the processes do not share.
        TypeError: a setting of the wrong type.
    """
    given = RunSettings.from_dict(settings)
    state = processes()
    sizes = _begin(model, tokenizer, tasks, Path(output), given, state)
    found = {}
    with evaluating(model):
        for task in tasks:
            batches, folder = _batches(sizes[task.name], given.batch), Path(output) / task.name
            warm = _answer(model, tokenizer, task, batches, folder, given, state, warm)
            state.wait_for_everyone()
            done = _done(folder, batches)
            if len(done) < len(batches):
                raise ValueError(
                    f"{folder} lacks the answers to {len(batches) - len(done)} of {len(batches)} batches: is the "
                    "output folder one that all processes share?"
                )
            rows = [done[number] for number in range(len(batches))]
            found[task.name] = {"samples": sizes[task.name], **summary(task, rows)}
    return found


def compare(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[EvalTask],
    output: str | os.PathLike[str],
    runs: Mapping[str, Run] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """A model without patches and with them, in one report: `report.json`, `report.md` and `report.html`.

    Args:
        model: see `evaluate`; patched without `runs`, and not patched with them. It stays so.
        tokenizer: of the model.
        tasks: with different names.
        output: folder; the answers of each run go into a folder of its name.
        runs: name of a run to its variants with their settings, the outermost first, such as
            `{"half": {"moh": {"active_ratio": 0.5}}}`, or to the folder of a saved patch, of a LoRA adapter, or of an
            adapter with the patch beside it that it was trained on.
        settings: fields of `RunSettings`: batch, seed and limit.

    Returns:
        What `report.json` holds; see `patchattn.evaluation.report.report`.

    Raises:
        ValueError: see `evaluate`; a model that is patched or not against what is said above; a run that does not fit
            the model, or whose name is taken.
        TypeError: a setting of the wrong type.
        NotImplementedError: a variant that the model cannot have; see `patchattn.patch_model`.
    """
    given = RunSettings.from_dict(settings)
    if is_patched(model) == (runs is not None):
        raise ValueError(
            "compare expects a patched model, or an unpatched one and runs; "
            f"got {'a patched one and runs' if is_patched(model) else 'neither'}."
        )
    check_runs([patched_name(model)] if runs is None else list(runs))
    state = processes()
    folder, ways, found, patches = Path(output), _ways(model, runs, given.seed), {}, {}
    for name, way in ways.items():  # what is refused is so before the first run takes its time
        with way():
            counted = {"parameters": own_parameters(model), "adapter_parameters": adapter_parameters(model)}
            patches[name] = {**patch_info(model), **counted}
            _begin(model, tokenizer, tasks, folder / folder_name(name), given, state)
    for name, way in ways.items():
        with way():
            found[name] = evaluate(model, tokenizer, tasks, folder / folder_name(name), **settings)
    rows = {
        task.name: {
            name: answers(folder / folder_name(name), task.name, run[task.name]["samples"], given.batch)
            for name, run in found.items()
        }
        for task in tasks
    }
    report = make_report(model, tasks, found, patches, {**given.to_dict(), "processes": state.num_processes}, rows)
    if state.is_main_process:
        figures = [(task.name, task.figure(rows[task.name])) for task in tasks]
        write_report(report, folder, [(name, figure) for name, figure in figures if figure is not None])
    state.wait_for_everyone()
    return report


def answers(output: Path, task: str, samples: int, batch: int) -> list[Row]:
    """Answers to all samples of a task, in their order, from the output folder of an `evaluate` that is done.

    Raises:
        ValueError: some are not there.
    """
    batches = _batches(samples, batch)
    done = _done(output / task, batches)
    if len(done) < len(batches):
        raise ValueError(f"{output / task} lacks answers to {len(batches) - len(done)} of {len(batches)} batches.")
    return [row for number in range(len(batches)) for row in done[number]]


def check_tasks(tasks: Sequence[EvalTask]) -> None:
    """ValueError if there are no tasks, one has no samples, or one is given twice."""
    if not tasks:
        raise ValueError("There is nothing to evaluate: give at least one task.")
    names = [task.name for task in tasks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"The task {twice[0]} is given {names.count(twice[0])} times.")
    if empty := [task.name for task in tasks if len(task) == 0]:
        raise ValueError(f"The task {empty[0]} has no samples.")


def check_runs(names: Sequence[str]) -> None:
    """ValueError if there are no runs or too many for a picture, or a name is `unpatched` or shares a folder."""
    if not names:
        raise ValueError("There is nothing to compare with the unpatched model: give at least one run.")
    if len(names) >= MOST_RUNS:
        raise ValueError(f"A report has room for {MOST_RUNS - 1} runs beside the unpatched model, got {len(names)}.")
    folders = [folder_name(name) for name in (UNPATCHED, *names)]
    for name, folder in zip(names, folders[1:], strict=True):
        if not folder or folders.count(folder) > 1:
            raise ValueError(f"The run {name!r} has the folder {folder!r}, which another run has: rename it.")


def folder_name(run: str) -> str:
    """The name of a run as that of a folder."""
    return re.sub(r"[^\w.+=-]+", "_", run).strip("_.")


def patched_name(model: Any) -> str:
    """A run's name for a model that is patched."""
    return "+".join(dict.fromkeys(patch["variant"] for patch in patch_info(model)["patches"]))


def processes(cpu: bool = False) -> Any:
    """Which of how many processes this is.

    They wait for each other at the end of a task, for which the slowest may take hours.

    Args:
        cpu: whether to leave GPUs alone.

    Raises:
        ValueError: several processes were started, and do not know of each other.
    """
    cpu = cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=timedelta(days=7))
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and state.num_processes == 1:  # each would do everything, and write over the others
        raise ValueError(
            f"{started} processes were started, and accelerate's PartialState knows of one: make it first, with "
            "PartialState(cpu=True) for CPUs."
        )
    return state


def _ways(
    model: Any, runs: Mapping[str, Run] | None, seed: int
) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """Name of each run to what makes the model be so."""
    if runs is None:
        return {UNPATCHED: lambda: unpatched(model), patched_name(model): nullcontext}
    return {UNPATCHED: nullcontext, **{name: partial(patched_run, model, run, seed) for name, run in runs.items()}}


@contextmanager
def patched_run(model: Any, run: Run, seed: int, *, adapter: bool = True) -> Iterator[None]:
    """A run's patches, and the adapter that was trained with them, for the time of a block.

    Parameters that start at random start the same in every process and after every kill.

    Args:
        model: unpatched.
        run: its variants with their settings, outermost first, or a folder as `compare` takes it.
        seed: of what parameters start from.
        adapter: whether an adapter in the folder is put on.
    """
    with ExitStack() as stack:
        with torch.random.fork_rng(cuda_devices(model)):
            torch.manual_seed(seed)
            if isinstance(run, Mapping):
                variants = list(run)
                if not variants:
                    raise ValueError("A run needs at least one variant.")
                patch_model(model, variants, run[variants[0]] if len(variants) == 1 else run)
                stack.callback(unpatch_model, model)
            else:
                stack.enter_context(loaded(model, run, adapter=adapter))
        yield


def _begin(
    model: Any, tokenizer: Any, tasks: Sequence[EvalTask], output: Path, settings: RunSettings, state: Any
) -> dict[str, int]:
    """Refuse what cannot be run, note what the answers are made with, and say how many samples each task has."""
    check_tasks(tasks)
    sizes = {task.name: min(len(task), settings.limit or len(task)) for task in tasks}
    for task in tasks:
        task.check_model(model, tokenizer)
    made_with = _identity(model, tokenizer, settings)
    for task in tasks:
        own = {f"task.{key}": value for key, value in task.identity().items()}
        asked = {**made_with, **own, "samples": sizes[task.name]}
        claim(output / task.name, asked, write=state.is_main_process)
    return sizes


def _batches(samples: int, size: int) -> list[range]:
    return [range(start, min(start + size, samples)) for start in range(0, samples, size)]


def _identity(model: Any, tokenizer: Any, settings: RunSettings) -> dict[str, Any]:
    """What must not change between the starts of one run; the device, for the sake of the times."""
    text: Any = getattr(tokenizer, "tokenizer", tokenizer)
    template = [text.chat_template, text.special_tokens_map, len(text)]
    values = {key: value for key, value in settings.to_dict().items() if key != "limit"}
    adapters = adapter_tensors(model)
    return {
        **model_identity(model),
        "patch_sha256": _digest(_patch_tensors(base_model(model))),
        **({"adapter_sha256": _digest(adapters)} if adapters else {}),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        "tokenizer_sha256": hashlib.sha256(json.dumps(template, default=str).encode()).hexdigest(),
        **values,
    }


def _patch_tensors(base: nn.Module) -> dict[str, torch.Tensor]:
    """What the patches added: two trained ones differ in nothing else."""
    chains = active_chains(base).items()
    return {f"{site}.{name}": tensor for site, chain in chains for name, tensor in chain.tensors().items()}


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _answer(
    model: Any,
    tokenizer: Any,
    task: EvalTask,
    batches: Sequence[range],
    folder: Path,
    settings: RunSettings,
    state: Any,
    warm: bool,
) -> bool:
    """Append this process's share of what is missing to its file.

    What a device does once, such as choosing kernels, must not be in the times of the run that comes first: `warm` says
    whether the model has answered something, and what is returned whether it has now.
    """
    done = _done(folder, batches)
    share = [number for number in range(state.process_index, len(batches), state.num_processes) if number not in done]
    state.wait_for_everyone()  # all have read
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"process_{state.process_index}.jsonl"
    if path.exists():  # a last line that a kill cut off
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)
    if share and not warm:
        _ask(model, tokenizer, task, batches[share[0]], settings)
    silent = not (sys.stderr.isatty() and state.is_main_process and share)
    with path.open("a", encoding="utf-8") as file:
        for number in track(share, description=task.name, disable=silent):
            rows = _ask(model, tokenizer, task, batches[number], settings)
            numbered = [{"index": index, **row} for index, row in zip(batches[number], rows, strict=True)]
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in numbered))
            file.flush()
    return warm or bool(share)


def _ask(model: Any, tokenizer: Any, task: EvalTask, batch: range, settings: RunSettings) -> list[Row]:
    """The caller's random numbers go on as if nothing had been drawn."""
    with torch.random.fork_rng(cuda_devices(model)):
        torch.manual_seed(settings.seed * 1_000_003 + batch.start)
        return task.answer(model, tokenizer, list(batch))


def _done(folder: Path, batches: Sequence[range]) -> dict[int, list[Row]]:
    """Number of a batch to its rows, of the batches that are there whole, from however many processes.

    Raises:
        ValueError: a line that is none of such a run.
    """
    done: dict[int, list[Row]] = {}
    for path in sorted(folder.glob("process_*.jsonl")):
        content = path.read_bytes()
        found: dict[int, Row] = {}
        for number, row in json_lines(decoded(content[: content.rfind(b"\n") + 1], path), path):
            if not isinstance(row, dict) or not isinstance(row.get("index"), int):
                raise ValueError(f"{path}, line {number}: not an answer of such a run. Choose another output.")
            found[row["index"]] = row
        for number, batch in enumerate(batches):
            if all(index in found for index in batch):
                done.setdefault(number, [found[index] for index in batch])
    return done
