"""The tasks of GLUE (arXiv 1804.07461): training and validation rows, from the Hub or from files."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.settings import nearest
from ...files.documents import parse_json, quoted, read_text

Row = tuple[str, str | None, int | float]
Record = tuple[str, dict[str, Any]]  # where it stands, and its columns


@dataclass(frozen=True, kw_only=True)
class GlueTask:
    """One task.

    Attributes:
        name: as on the Hub.
        folder: name of its folder.
        texts: columns of its files with the first text and, for tasks on pairs, the second.
        label: column with the label.
        labels: what the files call label 0, 1, ...; empty for a score from 0 to 5.
        train, validation: its files; several are read one after the other. `.json` holds `{id: {column: text}}`, any
            other suffix tab-separated lines below a header.
        header: the columns of tab-separated files without a header.
        hub_texts: columns of the texts on the Hub.
    """

    name: str
    folder: str
    texts: tuple[str, ...]
    label: str = "label"
    labels: tuple[str, ...] = ("0", "1")
    train: tuple[str, ...] = ("train.tsv",)
    validation: tuple[str, ...] = ("dev.tsv",)
    header: tuple[str, ...] = ()
    hub_texts: tuple[str, ...] = ("sentence1", "sentence2")

    @property
    def is_regression(self) -> bool:
        """Whether the label is a score."""
        return not self.labels

    def number(self, label: str) -> int | float:
        """The label as files spell it, as a number.

        Raises:
            ValueError: it is none of the task's.
        """
        if label in self.labels:
            return self.labels.index(label)
        if self.labels:
            raise ValueError(f"the label must be {' or '.join(self.labels)}, got {label!r}.")
        try:
            score = float(label)
        except ValueError:
            score = -1.0
        if not 0.0 <= score <= 5.0:
            raise ValueError(f"the {self.label} must be a number from 0 to 5, got {label!r}.")
        return score


_PAIR = ("sentence1", "sentence2")
_JSON: dict[str, Any] = {"texts": ("text_a", "text_b"), "train": ("train.json",), "validation": ("dev.json",)}
_ENTAILMENT = ("entailment", "not_entailment")

GLUE_TASKS = {
    task.name: task
    for task in (
        GlueTask(
            name="cola",
            folder="CoLA",
            texts=("sentence",),
            header=("source", "label", "mark", "sentence"),
            validation=("dev.tsv", "dev_ood.tsv"),
            hub_texts=("sentence",),
        ),
        GlueTask(name="sst2", folder="SST-2", texts=("sentence",), hub_texts=("sentence",)),
        GlueTask(
            name="mrpc",
            folder="MRPC",
            texts=("#1 String", "#2 String"),
            label="Quality",
            train=("msr_paraphrase_train.txt",),
            validation=("msr_paraphrase_test.txt",),
        ),
        GlueTask(name="stsb", folder="STS-B", texts=_PAIR, label="score", labels=()),
        GlueTask(name="qqp", folder="QQP", hub_texts=("question1", "question2"), **_JSON),
        GlueTask(
            name="mnli",
            folder="MNLI",
            labels=("entailment", "neutral", "contradiction"),
            hub_texts=("premise", "hypothesis"),
            **_JSON,
        ),
        GlueTask(name="qnli", folder="QNLI", labels=_ENTAILMENT, hub_texts=("question", "sentence"), **_JSON),
        GlueTask(name="rte", folder="RTE", texts=_PAIR, labels=_ENTAILMENT),
        GlueTask(name="wnli", folder="WNLI", texts=_PAIR),
    )
}


def glue_task(name: str) -> GlueTask:
    """The task of that name.

    Raises:
        ValueError: there is none; the message names the nearest one.
    """
    if name not in GLUE_TASKS:
        raise ValueError(f"GLUE has no task {name!r}{nearest(str(name), list(GLUE_TASKS))}")
    return GLUE_TASKS[name]


def load_glue(task: str, folder: str | Path | None = None) -> tuple[Any, Any]:
    """Training and validation rows of a task.

    Args:
        task: `cola`, `sst2`, `mrpc`, `stsb`, `qqp`, `mnli`, `qnli`, `rte` or `wnli`.
        folder: holds one folder per task (`CoLA`, `SST-2`, ...) with files in the layout of `GlueTask`; the task is
            loaded from the Hub without one. Of MRPC, files are those of the original corpus, whose test rows take the
            place of validation rows: not GLUE's cut. MNLI's validation rows are the matched ones.

    Returns:
        Two `datasets.Dataset` with columns `sentence1`, `sentence2` (`None` for tasks on single sentences) and `label`
        (a class, for `stsb` a score from 0 to 5).

    Raises:
        ValueError: no such task, a file that is missing, truncated or not in its layout (the message says which, on
            what line, and what was expected), or the Hub cannot be reached.
        ImportError: `datasets` is not installed.
    """
    datasets = _datasets()
    asked = glue_task(task)
    if folder is None:
        train, validation = download_glue(task)
    else:
        train, validation = read_glue(Path(folder) / asked.folder, task)
    label = datasets.Value("float32") if asked.is_regression else datasets.ClassLabel(names=list(asked.labels))
    text = datasets.Value("string")
    features = datasets.Features({"sentence1": text, "sentence2": text, "label": label})
    made = []
    for rows in (train, validation):
        columns = dict(zip(features, map(list, zip(*rows, strict=True)), strict=True))
        made.append(datasets.Dataset.from_dict(columns, features=features))
    return made[0], made[1]


def download_glue(task: str) -> tuple[list[Row], list[Row]]:
    """Training and validation rows of a task from the Hub, as `read_glue` gives them.

    Raises:
        ValueError: no such task, or the Hub cannot be reached.
        ImportError: `datasets` is not installed.
    """
    glue_task(task)
    splits = _hub(task)
    return _hub_rows(splits, task, "train"), _hub_rows(splits, task, _hub_validation(task))


def validation_rows(task: str, folder: str | Path | None = None) -> list[Row]:
    """Validation rows alone, of files or of the Hub; takes and raises what `load_glue` does."""
    asked = glue_task(task)
    if folder is None:
        return _hub_rows(_hub(task), task, _hub_validation(task))
    return [row for name in asked.validation for row in _read(Path(folder) / asked.folder / name, asked)]


def _hub_validation(task: str) -> str:
    return "validation_matched" if task == "mnli" else "validation"


def _hub(task: str) -> Any:
    try:
        return _datasets().load_dataset("nyu-mll/glue", task)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(
            f"{task} cannot be loaded from the Hub ({reason}). Give the folder of a local copy instead."
        ) from error


def _hub_rows(splits: Any, task: str, name: str) -> list[Row]:
    split = splits[name]
    texts = [split[column] for column in glue_task(task).hub_texts]
    second = texts[1] if texts[1:] else [None] * len(split)
    return list(zip(texts[0], second, split["label"], strict=True))


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f'Loading GLUE needs {error.name}: pip install "patchattn[eval]"') from error
    return datasets


def read_glue(folder: Path, task: str) -> tuple[list[Row], list[Row]]:
    """Training and validation rows from the files of a task.

    Args:
        folder: of that task.
        task: its name.

    Returns:
        Two lists of (first text, second text or `None`, label).

    Raises:
        ValueError: no such task, or a file is missing, truncated or not in its layout; the message says which line.
    """
    asked = glue_task(task)
    train, validation = (
        [row for name in names for row in _read(folder / name, asked)] for names in (asked.train, asked.validation)
    )
    return train, validation


def _read(path: Path, task: GlueTask) -> list[Row]:
    if not path.is_file():
        files = ", ".join((*task.train, *task.validation))
        raise ValueError(f"There is no file {path}. The folder of {task.name} must hold: {files}.")
    text = read_text(path, encoding="utf-8-sig")
    rows: list[Row] = []
    for where, record in _json_records(path, text) if path.suffix == ".json" else _tsv_records(path, text, task):
        values: list[Any] = [record.get(name) for name in (*task.texts, task.label)]
        if not all(isinstance(value, str) for value in values):
            expected = ", ".join((*task.texts, task.label))
            raise ValueError(f"{path}, {where}: expected texts named {expected}, got {quoted(record)}.")
        try:
            rows.append((values[0], values[1] if task.texts[1:] else None, task.number(values[-1])))
        except ValueError as error:
            raise ValueError(f"{path}, {where}: {error}") from error
    if not rows:
        raise ValueError(f"{path} has no rows.")
    return rows


def _json_records(path: Path, text: str) -> Iterator[Record]:
    content = parse_json(text, path)
    if not isinstance(content, dict) or not all(isinstance(record, dict) for record in content.values()):
        raise ValueError(f"{path} must hold a mapping of ids to rows.")
    for key, record in content.items():
        yield f"row {key!r}", record


def _tsv_records(path: Path, text: str, task: GlueTask) -> Iterator[Record]:
    lines = text.split("\n")  # quotation marks are text like any other, and so is every break but the end of a line
    header = list(task.header) or lines.pop(0).split("\t")
    if missing := {*task.texts, task.label} - set(header):
        raise ValueError(f"{path} must begin with a header line with {', '.join(sorted(missing))}, got {header}.")
    if lines and lines[-1] == "":
        lines.pop()
    elif not task.header:  # CoLA's own files end like that
        raise ValueError(f"{path} ends within a line: is it cut off? If it is whole, end its last line.")
    for number, line in enumerate(lines, 1 if task.header else 2):
        cells = line.split("\t")
        if len(cells) != len(header):
            raise ValueError(
                f"{path}, line {number}: expected {len(header)} columns ({', '.join(header)}), got {len(cells)}."
            )
        yield f"line {number}", dict(zip(header, cells, strict=True))
