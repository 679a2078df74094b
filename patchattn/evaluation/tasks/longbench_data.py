"""The tasks of LongBench (arXiv 2308.14508): samples from official files, MiniLongBench's, or the Hub."""

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import hf_hub_download

from ...core.settings import nearest
from ...files.documents import decoded, json_lines, parse_json, quoted, read_json, read_text

HUB_ID = "THUDM/LongBench"

# the official prompts and output lengths; licence and origin lie beside the file
_OFFICIAL = read_json(Path(__file__).with_name("longbench_tasks.json"))
_CHINESE = frozenset({"multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh"})
_CLASSES = frozenset({"trec", "lsht"})
_WITHOUT_CHAT = frozenset({"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"})


@dataclass(frozen=True, kw_only=True)
class LongBenchTask:
    """One task.

    Attributes:
        name: as officially, also of its files.
        language: of its texts; code counts as English.
        prompt: official, with `{context}` and, in most, `{input}`.
        max_new_tokens: official length of the answer.
        chat: whether the official code puts the prompt into the model's chat template; not for few-shot tasks and code.
        has_classes: whether the answer is one of the sample's classes.
        stops_at_newline: whether a line break ends the answer.
    """

    name: str
    language: Literal["en", "zh"]
    prompt: str
    max_new_tokens: int
    chat: bool
    has_classes: bool
    stops_at_newline: bool


LONGBENCH_TASKS = {
    name: LongBenchTask(
        name=name,
        language="zh" if name in _CHINESE else "en",
        chat=name not in _WITHOUT_CHAT,
        has_classes=name in _CLASSES,
        stops_at_newline=name == "samsum",
        **official,
    )
    for name, official in _OFFICIAL.items()
}


@dataclass(frozen=True)
class LongBenchSample:
    """One question.

    Attributes:
        id: of the sample, unique within its task.
        prompt: whole, in the task's official form, not truncated.
        answers: right ones.
        classes: all class names, for `trec` and `lsht`.
    """

    id: str
    prompt: str
    answers: tuple[str, ...]
    classes: tuple[str, ...] = ()


def longbench_task(name: str) -> LongBenchTask:
    """The task of that name.

    Raises:
        ValueError: there is none; the message names the nearest one.
    """
    if name not in LONGBENCH_TASKS:
        raise ValueError(f"LongBench has no task {name!r}{nearest(str(name), list(LONGBENCH_TASKS))}")
    return LONGBENCH_TASKS[name]


def load_longbench(
    tasks: Sequence[str] | None = None, folder: str | Path | None = None
) -> dict[str, list[LongBenchSample]]:
    """The samples of tasks, checked; no model is needed for it.

    Args:
        tasks: their names; all 21 without.
        folder: holds a file per task: `qasper.jsonl` as LongBench has them, or `qasper.json` in the layout of
            MiniLongBench, whose prompts are filled in already. Without one, LongBench is loaded from the Hub (114 MB).

    Returns:
        Task to samples, in the order of `tasks` and of the files.

    Raises:
        ValueError: a task that does not exist or is given twice, a file that is missing, there in both layouts or not
            in its layout (the message names file and line), or the Hub cannot be reached.
        TypeError: `tasks` is a text.
    """
    if isinstance(tasks, str):
        raise TypeError(f"tasks must be a list of names, got {tasks!r}: write [{tasks!r}].")
    asked = [longbench_task(name) for name in (LONGBENCH_TASKS if tasks is None else tasks)]
    if not asked or len(set(asked)) < len(asked):
        raise ValueError(f"tasks must name at least one task, and none twice, got {list(tasks or ())}.")
    if folder is None:
        return _download(asked)
    paths = [_file(Path(folder), task) for task in asked]
    return {task.name: read_longbench(path, task.name) for task, path in zip(asked, paths, strict=True)}


def read_longbench(path: str | Path, task: str) -> list[LongBenchSample]:
    """The samples in one file of a task, `.jsonl` (official) or `.json` (MiniLongBench).

    Raises:
        ValueError: no such task or file, or a file not in its layout; the message names the line.
    """
    path, asked = Path(path), longbench_task(task)
    text = read_text(path)
    return _mini(str(path), text, asked) if path.suffix == ".json" else _official(str(path), text, asked)


def _file(folder: Path, task: LongBenchTask) -> Path:
    names = [name for name in (f"{task.name}.jsonl", f"{task.name}.json") if (folder / name).is_file()]
    if len(names) != 1:
        found = "both" if names else "neither"
        raise ValueError(f"The folder {folder} must hold {task.name}.jsonl or {task.name}.json, and holds {found}.")
    return folder / names[0]


def _download(tasks: Sequence[LongBenchTask]) -> dict[str, list[LongBenchSample]]:
    """Out of the archive that the dataset on the Hub consists of: `datasets` no longer runs its loading script."""
    try:
        path = hf_hub_download(HUB_ID, "data.zip", repo_type="dataset")
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(
            f"LongBench cannot be loaded from the Hub ({reason}). Give the folder of a local copy instead."
        ) from error
    found = {}
    with zipfile.ZipFile(path) as archive:
        members = {Path(name).name: name for name in archive.namelist()}
        for task in tasks:
            name = f"{task.name}.jsonl"
            if name not in members:
                raise ValueError(f"{path} holds no {name}; give the folder of a local copy instead.")
            place = f"{path}/{members[name]}"
            found[task.name] = _official(place, decoded(archive.read(members[name]), place), task)
    return found


def _official(where: str, text: str, task: LongBenchTask) -> list[LongBenchSample]:
    samples = []
    for number, row in _lines(where, text):
        place = f"{where}, line {number}"
        for key in ("input", "context"):
            if not isinstance(row.get(key), str):
                raise ValueError(f"{place}: {key} must be a text, got {quoted(row.get(key))}.")
        if row.get("dataset", task.name) != task.name:
            raise ValueError(f"{place}: a sample of {row['dataset']!r}, not of {task.name}.")
        prompt = task.prompt.format(context=row["context"], input=row["input"])
        samples.append(_sample(place, str(row.get("_id", number)), prompt, row, task))
    return _complete(where, samples)


def _lines(where: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, row in json_lines(text, where):
        if not isinstance(row, dict):
            raise ValueError(f"{where}, line {number}: expected an object, got {quoted(row)}.")
        yield number, row


def _mini(where: str, text: str, task: LongBenchTask) -> list[LongBenchSample]:
    """`{"0": {"origin_prompt": ..., "gold": answers, or answers and all_classes}}`; other keys are a model's output."""
    content = parse_json(text, where)
    if not isinstance(content, dict):
        raise ValueError(f"{where}, line 1: expected an object of samples, got a {type(content).__name__}.")
    samples = []
    for key, row in content.items():
        place = f"{where}, sample {key!r}"
        if not isinstance(row, dict) or not isinstance(row.get("origin_prompt"), str):
            raise ValueError(f"{place}: origin_prompt must be a text.")
        gold = row.get("gold")
        samples.append(
            _sample(place, key, row["origin_prompt"], gold if isinstance(gold, dict) else {"answers": gold}, task)
        )
    return _complete(where, samples)


def _sample(place: str, number: str, prompt: str, row: dict[str, Any], task: LongBenchTask) -> LongBenchSample:
    answers, classes = row.get("answers"), row.get("all_classes") or []
    if not _is_texts(answers) or not answers:
        raise ValueError(f"{place}: answers must be a list of texts, at least one, got {quoted(answers)}.")
    if not _is_texts(classes):
        raise ValueError(f"{place}: all_classes must be a list of texts or null, got {quoted(classes)}.")
    if task.has_classes and (unknown := [answer for answer in answers if answer not in classes]):
        raise ValueError(f"{place}: the answer {quoted(unknown[0])} is not one of all_classes, {quoted(classes)}.")
    return LongBenchSample(number, prompt, tuple(answers), tuple(classes))


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _complete(where: str, samples: list[LongBenchSample]) -> list[LongBenchSample]:
    if not samples:
        raise ValueError(f"{where}, line 1: no samples.")
    ids = [sample.id for sample in samples]
    if twice := next((name for name in ids if ids.count(name) > 1), None):
        raise ValueError(f"{where}: the id {twice!r} is used {ids.count(twice)} times.")
    return samples
