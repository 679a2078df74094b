"""LongBench (arXiv 2308.14508) as tasks of `patchattn eval`: answers of a causal language model to long prompts."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...core.settings import Settings, option
from ..metrics.longbench import LONGBENCH_METRICS, longbench_score
from .generation import check_generates, fit_prompt, generate, positions
from .longbench_data import LongBenchSample, load_longbench, longbench_task
from .task import EvalTask, Row


@dataclass(frozen=True, kw_only=True)
class LongBenchSettings(Settings):
    """How the questions are asked; answers are greedy.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """

    data: str | None = option(None, help="Folder with a file per task; None: the Hub.")
    max_length: int | None = option(
        None,
        help="Longest prompt, without chat template, as LongBench sets it per model, also beyond its positions; None: "
        "what these leave beside template and answer.",
        unit="tokens",
        minimum=2,
    )
    chat_template: Literal["official", "always", "never"] = option(
        "official",
        help="Use the tokenizer's chat template; official: if it has one, but not for few-shot tasks and code.",
    )


class LongBenchEval(EvalTask):
    """A task of LongBench.

    Args:
        task: its name, such as `qasper`.
        samples: of `load_longbench`; loaded without.
        settings: fields of `LongBenchSettings`.

    Raises:
        ValueError: no such task, no samples, samples that the metric cannot take, or what `load_longbench` raises it
            for.
        TypeError: a setting of the wrong type.
        ImportError: Chinese tasks without `jieba`.
    """

    generates = True

    def __init__(self, task: str, samples: Sequence[LongBenchSample] | None = None, **settings: Any) -> None:
        self.settings = LongBenchSettings.from_dict(settings)
        self.task = longbench_task(task)
        self.name = f"longbench/{task}"
        self.main_score = LONGBENCH_METRICS[task]
        self.samples = list(load_longbench([task], self.settings.data)[task] if samples is None else samples)
        if not self.samples:
            raise ValueError(f"{self.name} needs at least one sample.")
        for sample in self.samples:  # answers and classes that the metric cannot take, and packages that it lacks
            longbench_score(task, "", sample.answers, sample.classes)

    def __len__(self) -> int:
        return len(self.samples)

    def identity(self) -> Mapping[str, Any]:
        """The settings, but for the place of the files, and a digest of the samples."""
        asked = [[sample.id, sample.prompt, sample.answers, sample.classes] for sample in self.samples]
        return {
            "max_length": self.settings.max_length,
            "chat_template": self.settings.chat_template,
            "samples_sha256": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        }

    def check_model(self, model: Any, tokenizer: Any) -> None:
        """ValueError for a model with an encoder or too few positions, and a tokenizer that lacks what is asked for."""
        check_generates(model, tokenizer)
        if self.settings.chat_template == "always" and not tokenizer.chat_template:
            raise ValueError("chat_template is 'always', and the tokenizer has no chat template.")
        room = self._room(model)
        if self.settings.max_length is None and (room is None or room < 2):
            raise ValueError(
                f"{type(model).__name__} has {positions(model)} positions, of which {self.name} needs "
                f"{self.task.max_new_tokens} for the answer: give max_length, or leave out tasks with long answers."
            )

    def answer(self, model: Any, tokenizer: Any, indices: Sequence[int]) -> list[Row]:
        """Rows in the form that the official evaluation reads, with `truncated` and the batch's costs."""
        batch = [self.samples[index] for index in indices]
        official = self.task.chat and bool(tokenizer.chat_template)
        chat = {"official": official, "always": True, "never": False}[self.settings.chat_template]
        length = self.settings.max_length
        room = self._room(model) if length is None else None
        prompts = [fit_prompt(tokenizer, sample.prompt, max_length=length, room=room, chat=chat) for sample in batch]
        made = generate(
            model,
            tokenizer,
            [prompt.tokens for prompt in prompts],
            max_new_tokens=self.task.max_new_tokens,
            stops_at_newline=self.task.stops_at_newline,
            prefixes=self.prefixes,
        )
        return [
            {
                "id": sample.id,
                "answers": list(sample.answers),
                "all_classes": list(sample.classes) or None,
                "truncated": prompt.truncated,
                **row,
            }
            for sample, prompt, row in zip(batch, prompts, made, strict=True)
        ]

    def score(self, rows: Sequence[Row]) -> dict[str, float]:
        """The official metric's mean, and which share of the prompts was truncated; both from 0 to 100."""
        return {
            self.main_score: sum(self.values(rows)) / len(rows),
            "truncated": 100 * sum(row["truncated"] for row in rows) / len(rows),
        }

    def values(self, rows: Sequence[Row]) -> list[float]:
        """The official metric of each row."""
        name = self.task.name
        return [100 * longbench_score(name, row["pred"], row["answers"], row["all_classes"]) for row in rows]

    def _room(self, model: Any) -> int | None:
        """What the answer leaves of the model's positions."""
        known = positions(model)
        return None if known is None else known - self.task.max_new_tokens
