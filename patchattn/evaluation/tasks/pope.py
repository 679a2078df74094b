"""POPE (arXiv 2305.10355): yes/no questions after objects in images, with answers from a vision-language model."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ...files.documents import json_lines, parse_json, quoted, read_text
from ..metrics.pope import Pope
from .vlm import GenerationSettings, Request, answer, files_in


@dataclass(frozen=True)
class PopeQuestion:
    """One question.

    Attributes:
        question_id: number within its file.
        image: name of the image's file.
        text: such as "Is there a dog in the image?".
        label: the right answer.
    """

    question_id: int
    image: str
    text: str
    label: Literal["yes", "no"]


def read_pope(path: str | os.PathLike[str]) -> list[PopeQuestion]:
    """The questions of an official file, whose name ends in `.json`: an object per line, or a list of objects.

    Raises:
        ValueError: the file is missing or not valid JSON, lacks a value or has a strange one, repeats a
            question_id, or has no questions; the message names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {str(path)!r} with POPE's questions.")
    questions: dict[int, PopeQuestion] = {}
    for line, record in _records(path):
        question = _question(f"{path}, line {line}", record)
        if questions.setdefault(question.question_id, question) is not question:
            raise ValueError(f"{path}, line {line}: question_id {question.question_id} has been used above.")
    if not questions:
        raise ValueError(f"{path}, line 1: no questions.")
    return list(questions.values())


def run_pope(
    model: Any,
    processor: Any,
    questions: Sequence[PopeQuestion],
    images: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    suffix: str = "",
    **generation: Any,
) -> dict[str, float]:
    """Ask a vision-language model POPE's questions; a run that was killed continues.

    The results file is one that the official evaluation reads: a JSON object with `question` and `answer` per line,
    with question_id, image and label beside them.

    Args:
        model: a transformers model that generates from images and text, patched or not.
        processor: of the model.
        questions: of `read_pope`.
        images: folder with their images.
        output: results file; see `patchattn.evaluation.tasks.vlm.answer`.
        suffix: put after each question and a space, such as "Please answer this question with one word.".
        generation: fields of `patchattn.evaluation.tasks.vlm.GenerationSettings`, such as batch and max_new_tokens.

    Returns:
        The scores; see `patchattn.evaluation.metrics.pope.pope_scores`.

    Raises:
        ValueError: missing images, a results file of another run, or an unknown or bad setting.
        TypeError: a setting of the wrong type.
    """
    settings = GenerationSettings.from_dict(generation)
    answers = answer(model, processor, pope_requests(questions, images, suffix), output, settings)
    labels = [question.label for question in questions]
    return Pope(keep_in_memory=True).compute(predictions=answers, references=labels)


def pope_requests(questions: Sequence[PopeQuestion], images: str | os.PathLike[str], suffix: str = "") -> list[Request]:
    """What is asked about which image; takes and raises what `run_pope` does."""
    requests = []
    for question, file in zip(questions, files_in(images, [question.image for question in questions]), strict=True):
        fields = asdict(question)
        fields["question"] = fields.pop("text")
        requests.append(Request(fields, file, f"{question.text} {suffix}" if suffix else question.text))
    return requests


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """The JSON values of a file with one per line, or of a list, and the lines they start at."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        values = parse_json(text, path)
        decoder, place = json.JSONDecoder(), text.index("[") + 1
        number = text.count("\n", 0, place) + 1
        for value in values:
            while text[place] in " \t\r\n,":
                number += text[place] == "\n"
                place += 1
            yield number, value
            end = decoder.raw_decode(text, place)[1]
            number, place = number + text.count("\n", place, end), end
        return
    yield from json_lines(text, path)


def _question(where: str, record: Any) -> PopeQuestion:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object, got {quoted(record)}.")
    for key, kind in (("question_id", int), ("image", str), ("text", str), ("label", str)):
        if not isinstance(record.get(key), kind) or isinstance(record[key], bool):
            raise ValueError(f"{where}: {key} must be {kind.__name__}, got {quoted(record.get(key))}.")
    if record["label"] not in ("yes", "no"):
        raise ValueError(f"{where}: label must be 'yes' or 'no', got {quoted(record['label'])}.")
    return PopeQuestion(record["question_id"], record["image"], record["text"], record["label"])
