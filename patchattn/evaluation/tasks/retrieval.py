"""Tasks that hide statements in a long text and ask for them: what they have in common."""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from ...core.settings import Settings, option
from .generation import check_generates, generate
from .haystack import Frame, Prompt, PromptBuilder, filler, read_texts, sentences
from .positions import check_positions
from .task import EvalTask, Row


@dataclass(frozen=True, kw_only=True)
class RetrievalSettings(Settings):
    """What tasks with hidden statements have in common.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range, or no length or the same one twice.
    """

    lengths: tuple[int, ...] = option(
        (1024, 2048, 4096),
        help="Lengths of the prompts: everything the model is given, special tokens and chat template included.",
        unit="tokens",
        minimum=1,
    )
    data: str | None = option(
        None,
        help="Text that the statements are hidden in: a file, or a folder with .txt files; None: generated sentences.",
    )
    chat_template: Literal["auto", "always", "never"] = option(
        "auto", help="Use the tokenizer's chat template; auto: if it has one."
    )
    max_new_tokens: int = option(128, help="Longest answer.", unit="tokens", minimum=1)
    seed: int = option(
        0, help="Seed of the statements, their depths, and where in the text a prompt begins.", minimum=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_list("lengths", self.lengths)


def check_list(name: str, values: Sequence[Any]) -> None:
    """Raise ValueError for a list of settings that is empty or holds a value twice."""
    if not values or len(set(values)) != len(values):
        raise ValueError(f"{name} must hold at least one value, and none twice, got {list(values)!r}.")


@dataclass(frozen=True)
class Sample:
    """One prompt to be.

    Attributes:
        length: of the whole prompt, in tokens.
        frame: what stands around the text.
        statements: depth in percent, and sentence.
        expected: strings that the answer should hold.
        text: sentences that take the place of the task's text.
        fields: what the row says of the sample beside its length.
    """

    length: int
    frame: Frame
    statements: Sequence[tuple[float, str]]
    expected: Sequence[str]
    text: Sequence[str] | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


class RetrievalTask(EvalTask):
    """Statements hidden in a long text; the score is the share of the expected strings that answers hold.

    Rows say `length`, `depths` (percent, where the statements came to stand), `expected`, `pred` (the answer, which
    ends where it holds all that is expected, for more of it changes no score) and what the answer cost. Scores are
    `recall`, the mean over samples of the share of expected strings found, letters of
    either case, times 100; and `recall@<length>`.

    Args:
        settings: fields of `settings_class`.

    Raises:
        TypeError, ValueError: a wrong or unknown setting, or a text that cannot be read.
    """

    settings_class: ClassVar[type[RetrievalSettings]]
    main_score = "recall"
    generates = True

    def __init__(self, **settings: Any) -> None:
        self.settings: Any = self.settings_class.from_dict(settings)
        data = self.settings.data
        self._text = filler(self.settings.seed) if data is None else read_texts(data)
        self._sentences = sentences(self._text)
        self._builder: PromptBuilder | None = None

    @abstractmethod
    def sample(self, index: int) -> Sample:
        """The sample of that number, the same every time."""

    def identity(self) -> Mapping[str, Any]:
        """The settings, and a digest in place of the text, which may move."""
        digest = hashlib.sha256(self._text.encode()).hexdigest()
        return {"task_settings": {**self.settings.to_dict(), "data": digest}}

    def check_model(self, model: Any, tokenizer: Any) -> None:
        """Refuse a model that cannot answer, or a tokenizer for which the shortest prompts are too short.

        Raises:
            ValueError: an encoder, a table of too few positions, a tokenizer without padding token or without a chat
                template where one is asked for, or prompts that do not fit their length.
        """
        check_generates(model, tokenizer)
        check_positions(model, max(self.settings.lengths) + self.settings.max_new_tokens)
        for index in range(len(self)):
            if self.sample(index).length == min(self.settings.lengths):
                self.prompt(tokenizer, index)

    def prompt(self, tokenizer: Any, index: int) -> Prompt:
        """The tokens of one sample, exactly as many as its length says.

        Raises:
            ValueError: everything but the text takes more than that.
        """
        if self._builder is None or self._builder.tokenizer is not tokenizer:
            self._builder = PromptBuilder(tokenizer, self._sentences, self.settings.chat_template)
        sample = self.sample(index)
        start = int(np.random.default_rng((self.settings.seed, 1, index)).integers(len(self._sentences)))
        return self._builder.build(sample.length, sample.frame, sample.statements, start=start, text=sample.text)

    def answer(self, model: Any, tokenizer: Any, indices: Sequence[int]) -> list[Row]:
        prompts = [self.prompt(tokenizer, index) for index in indices]
        answers = generate(
            model,
            tokenizer,
            [prompt.tokens for prompt in prompts],
            max_new_tokens=self.settings.max_new_tokens,
            wanted=[self.sample(index).expected for index in indices],
            prefixes=self.prefixes,
        )
        rows = []
        for index, prompt, answer in zip(indices, prompts, answers, strict=True):
            sample = self.sample(index)
            asked = {"length": sample.length, "depths": prompt.depths, "expected": list(sample.expected)}
            rows.append({**asked, **sample.fields, **answer})
        return rows

    def score(self, rows: Sequence[Row]) -> dict[str, float]:
        """`recall` of all rows, and of those of each length as `recall@<length>`."""
        found = {"recall": [recall(row) for row in rows]}
        for row in rows:
            found.setdefault(f"recall@{row['length']}", []).append(recall(row))
        return {name: 100 * float(np.mean(values)) for name, values in found.items()}

    def values(self, rows: Sequence[Row]) -> list[float]:
        """The recall of each row."""
        return [100 * recall(row) for row in rows]


def recall(row: Mapping[str, Any]) -> float:
    """Share of the expected strings that an answer holds, letters of either case."""
    answer = row["pred"].lower()
    return float(np.mean([text.lower() in answer for text in row["expected"]]))
