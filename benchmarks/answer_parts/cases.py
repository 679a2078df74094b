"""Prompts with an answer that is expected, and texts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from patchattn.evaluation.tasks.generation import fit_prompt
from patchattn.evaluation.tasks.haystack import read_texts
from patchattn.evaluation.tasks.longbench_data import load_longbench, longbench_task
from patchattn.evaluation.tasks.ruler import NiahMultikey, NiahSingle, RulerTask, VariableTracking

NEEDLES: dict[str, type[RulerTask]] = {"single": NiahSingle, "multi-key": NiahMultikey, "tracking": VariableTracking}
LONGBENCH = ("lcc", "samsum")
TEXT, CONTINUATION = "text", "continuation"
CONTINUED = 256  # tokens whose loss is measured behind a prompt
SEEN = 32  # last tokens of a prompt without a question of its own that a cache is not compressed behind


@dataclass(frozen=True)
class Case:
    """One prompt.

    Attributes:
        task: the prompt is of.
        length: asked for, in tokens.
        index: of the prompt in its task and length.
        text: tokens up to the question.
        question: tokens of the prompt behind them; none of a text.
        answer: tokens that are expected, at least two.
    """

    task: str
    length: int
    index: int
    text: list[int]
    question: list[int]
    answer: list[int]

    @property
    def key(self) -> str:
        return f"{self.task}/{self.length}/{self.index}"

    @property
    def in_one_call(self) -> bool:
        """Whether there are too many expected tokens for a call each."""
        return self.task in (TEXT, CONTINUATION)

    @property
    def prompt(self) -> list[int]:
        return self.text + self.question


def needle(tokenizer: Any, name: str, length: int, index: int, text: str | None) -> Case:
    """A prompt of RULER, whose answer are the expected strings in their order."""
    task = NEEDLES[name](samples=index + 1, lengths=[length], data=text)
    sample, tokens = task.sample(index), task.prompt(tokenizer, index).tokens
    question = sample.frame.question
    behind = next((n for n in range(len(tokens), 0, -1) if question in tokenizer.decode(tokens[n:])), 0)
    if not behind:
        raise ValueError(f"{name}: the question was not found in the prompt.")
    answer = tokenizer(" " + ", ".join(sample.expected), add_special_tokens=False)["input_ids"]
    return Case(name, length, index, tokens[:behind], tokens[behind:], answer)


def longbench(tokenizer: Any, name: str, length: int, index: int, folder: str) -> Case:
    """A prompt of LongBench, cut in its middle to so many tokens, and its first right answer."""
    sample, chat = load_longbench([name], folder)[name][index], longbench_task(name).chat
    tokens = fit_prompt(tokenizer, sample.prompt, max_length=length, chat=chat).tokens
    said = sample.answers[0] if sample.answers[0][:1].isspace() else " " + sample.answers[0]
    answer = tokenizer(said, add_special_tokens=False)["input_ids"]
    return Case(name, length, index, tokens[:-SEEN], tokens[-SEEN:], answer)


def text_of(tokenizer: Any, task: str, length: int, index: int, data: str) -> Case:
    """Tokens of a text: all of them are expected, or those behind a prompt."""
    tokens = tokenizer(read_texts(data), add_special_tokens=False)["input_ids"]
    size = length + (CONTINUED if task == CONTINUATION else 0)
    part = tokens[index * size : (index + 1) * size]
    if len(part) < size:
        raise ValueError(f"{data} has {len(tokens)} tokens, which is too few for text {index} of {size}.")
    known = length if task == CONTINUATION else 1
    return Case(task, length, index, part[:known], [], part[known:])


def cases(
    tokenizer: Any, tasks: Sequence[str], length: int, numbers: Sequence[int], text: str | None, folder: str | None
) -> Iterator[Case]:
    """Those with these numbers, of every task in turn; tasks without their data are left out."""
    for index in numbers:
        for task in tasks:
            if task in NEEDLES:
                yield needle(tokenizer, task, length, index, text)
            elif task in LONGBENCH and folder is not None:
                yield longbench(tokenizer, task, length, index, folder)
            elif task in (TEXT, CONTINUATION) and text is not None:
                yield text_of(tokenizer, task, length, index, text)
