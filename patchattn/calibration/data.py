"""Texts that heads are scored on, from files, as batches for a model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from ..files.documents import json_lines, quoted, read_text

Task = Literal["causal", "masked", "classify", "none"]
Batch = dict[str, torch.Tensor]
_FIRST, _SECOND = ("text", "sentence", "sentence1"), "sentence2"
_SUFFIXES = (".txt", ".jsonl", ".tsv")
_MASKED = 0.15  # share of the tokens that a masked language model is to predict, as BERT was trained


@dataclass(frozen=True)
class TextExample:
    """One text, or a pair.

    Attributes:
        text, second: the text, and the second one of a pair.
        label: as the file has it; `None` where it has none.
    """

    text: str
    second: str | None = None
    label: int | str | None = None


def read_texts(path: str | Path) -> list[TextExample]:
    """Read texts from a file, or from all files of a folder.

    Args:
        path: `.txt`: one text. `.jsonl`: a JSON object a line. `.tsv`: tab-separated lines below a header. Objects and
            columns have `text`, `sentence` or `sentence1`, and may have `sentence2` and `label`.

    Raises:
        ValueError: no such file, none of these kinds, or not in that layout; the message says which line.
    """
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
        if not files:
            raise ValueError(f"The folder {path} holds no file of the kinds {', '.join(_SUFFIXES)}.")
    elif not path.is_file():
        raise ValueError(f"There is no file {str(path)!r}.")
    return [example for file in files for example in _read(file)]


def _read(path: Path) -> list[TextExample]:
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{path}: expected a file of the kinds {', '.join(_SUFFIXES)}.")
    content = read_text(path, encoding="utf-8-sig")
    if path.suffix == ".txt":
        found = [TextExample(content)] if content.strip() else []
    else:
        is_json = path.suffix == ".jsonl"
        records = json_lines(content, path, skip_empty=True) if is_json else tsv_records(path, content)
        found = [_example(path, number, record) for number, record in records]
    if not found:
        raise ValueError(f"{path} holds no text.")
    return found


def tsv_records(path: Path, content: str) -> Iterator[tuple[int, Any]]:
    lines = content.split("\n")  # quotation marks are text like any other, and so is every break but the end of a line
    header = lines[0].rstrip("\r").split("\t")
    for number, line in enumerate(lines[1:], start=2):
        cells = line.rstrip("\r").split("\t")
        if line.strip() and len(cells) != len(header):
            raise ValueError(f"{path}, line {number}: expected {len(header)} columns {header}, got {len(cells)}.")
        if line.strip():
            yield number, dict(zip(header, cells, strict=True))


def _example(path: Path, number: int, record: Any) -> TextExample:
    known = record if isinstance(record, Mapping) else {}
    text, second = next((known[name] for name in _FIRST if name in known), None), known.get(_SECOND)
    label = known.get("label")
    if not isinstance(text, str) or not isinstance(second, str | None):
        raise ValueError(f"{path}, line {number} must have a text named {' or '.join(_FIRST)}, got {quoted(record)}.")
    if isinstance(label, bool) or not isinstance(label, int | str | None):
        raise ValueError(f"{path}, line {number}: a label is a class by number or name, got {quoted(label)}.")
    return TextExample(text, second, int(label) if isinstance(label, str) and label.isdecimal() else label)


def task_of(config: Any) -> Task:
    """What a model is for, by the architecture that its configuration names.

    Raises:
        NotImplementedError: something that is not called with one text.
    """
    name = (config.architectures or [""])[0]
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(f"{name} takes two sequences: call patchattn.head_importance with batches instead.")
    for task, endings in {
        "classify": ("ForSequenceClassification",),
        "masked": ("ForMaskedLM",),
        "causal": ("ForCausalLM", "LMHeadModel"),
    }.items():
        if name.endswith(endings):
            return task  # type: ignore[return-value]
    return "none"


def auto_class(task: Task) -> Any:
    """The Auto class of transformers that loads a model for a task."""
    names = {"causal": "ForCausalLM", "masked": "ForMaskedLM", "classify": "ForSequenceClassification", "none": ""}
    return getattr(transformers, "AutoModel" + names[task])


def class_numbers(examples: Sequence[TextExample], config: Any) -> list[int]:
    """The class of every example, as a classifier's configuration numbers and names them.

    Raises:
        ValueError: an example without label, or with one that the model does not have.
    """
    names = {name: number for number, name in config.id2label.items()}
    found = []
    for example in examples:
        number = names.get(example.label, example.label)
        if not isinstance(number, int) or not 0 <= number < config.num_labels:
            raise ValueError(
                f"A classifier of {config.num_labels} classes needs labels from 0 to {config.num_labels - 1}, or of "
                f"{', '.join(names)}; {example.text[:40]!r} has {example.label!r}."
            )
        found.append(number)
    return found


def make_batches(
    tokenizer: Any,
    examples: Sequence[TextExample],
    task: Task,
    *,
    labels: Sequence[int] | None = None,
    length: int = 512,
    batch_size: int = 8,
    samples: int | None = None,
) -> list[Batch]:
    """Token ids, masks and labels of texts, padded on the right.

    Long texts are cut into pieces, but for a classifier, where their end is left out. A masked language model gets
    15 % of its tokens masked, the same ones every time, and is to predict those.

    Args:
        tokenizer: the model's.
        examples: texts.
        task: of `task_of`.
        labels: classes, for a classifier.
        length: of the longest row, in tokens.
        batch_size: rows of a batch.
        samples: take this many rows, from the first on; all by default.

    Raises:
        ValueError: no row with two tokens.
    """
    rows = [row for row in _rows(tokenizer, examples, task, labels, length) if len(row["input_ids"]) > 1][:samples]
    if not rows:
        raise ValueError("The texts do not add up to a single row of two tokens.")
    batches: list[Batch] = []
    for start in range(0, len(rows), batch_size):
        batch = _padded(rows[start : start + batch_size], tokenizer.pad_token_id or 0)
        batches.append(_masked(tokenizer, batch, seed=len(batches)) if task == "masked" else batch)
    return batches


def _rows(
    tokenizer: Any, examples: Sequence[TextExample], task: Task, labels: Sequence[int] | None, length: int
) -> Iterator[dict[str, Any]]:
    names = tokenizer.model_input_names
    for number, example in enumerate(examples):
        if task == "causal":
            tokens = tokenizer(example.text, verbose=False)["input_ids"]
            pieces = [tokens[start : start + length] for start in range(0, len(tokens), length)]
            yield from ({"input_ids": piece, "attention_mask": [1] * len(piece)} for piece in pieces)
        elif task == "classify":
            found = tokenizer(example.text, example.second, truncation=True, max_length=length)
            row = {name: found[name] for name in names}
            yield row if labels is None else {**row, "labels": labels[number]}
        else:
            if not tokenizer.is_fast:
                raise NotImplementedError(f"{type(tokenizer).__name__} cannot cut long texts up: use a fast tokenizer.")
            found = tokenizer(
                example.text, example.second, truncation=True, max_length=length, return_overflowing_tokens=True
            )
            yield from ({name: found[name][i] for name in names} for i in range(len(found["input_ids"])))


def _padded(rows: Sequence[dict[str, Any]], padding: int) -> Batch:
    longest = max(len(row["input_ids"]) for row in rows)
    batch: Batch = {}
    for name in rows[0]:
        fill = [padding if name == "input_ids" else 0]
        values = [row[name] if name == "labels" else row[name] + fill * (longest - len(row[name])) for row in rows]
        batch[name] = torch.tensor(values)
    return batch


def _masked(tokenizer: Any, batch: Batch, seed: int) -> Batch:
    if tokenizer.mask_token_id is None:
        raise ValueError("The tokenizer of this masked language model has no mask token.")
    tokens = batch["input_ids"]
    special = torch.isin(tokens, torch.tensor(tokenizer.all_special_ids)) | (batch["attention_mask"] == 0)
    chosen = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed)) < _MASKED
    chosen &= ~special
    labels = tokens.masked_fill(~chosen, -100)
    return {**batch, "input_ids": tokens.masked_fill(chosen, tokenizer.mask_token_id), "labels": labels}
