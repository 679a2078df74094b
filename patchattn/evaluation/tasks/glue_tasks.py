"""GLUE as tasks of `patchattn eval`: by a classifier's head, or by the likelihood a language model gives to labels."""

import hashlib
import json
import statistics
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from ...core.settings import Settings, option
from ..metrics.glue import GLUE_METRICS
from .cost import measured
from .generation import check_generates, fit_prompt, positions
from .glue import glue_task, validation_rows
from .likelihood import prepare_choices, score_batch
from .task import EvalTask, ModelKind, Row

_ENTAILMENT = ("entailment", "not_entailment")
# what label 0, 1, ... is called on the Hub, and so by the checkpoints that name their labels
LABEL_NAMES = {
    "cola": ("unacceptable", "acceptable"),
    "sst2": ("negative", "positive"),
    "mrpc": ("not_equivalent", "equivalent"),
    "qqp": ("not_duplicate", "duplicate"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": _ENTAILMENT,
    "rte": _ENTAILMENT,
    "wnli": _ENTAILMENT[::-1],
}
MAIN_SCORES = {"cola": "matthews_correlation", "mrpc": "mean", "qqp": "mean", "stsb": "mean"}

# for language models: a question with {first} and {second}, and the answers that stand for label 0, 1, ...
_PAIR = "{first}\nQuestion: {second} "
PROMPTS = {
    "cola": ("{first}\nQuestion: Is this sentence grammatical, yes or no?\nAnswer:", (" no", " yes")),
    "sst2": ("{first}\nQuestion: Is this review negative or positive?\nAnswer:", (" negative", " positive")),
    "mrpc": (
        "Sentence 1: {first}\nSentence 2: {second}\nQuestion: Do both sentences mean the same, yes or no?\nAnswer:",
        (" no", " yes"),
    ),
    "stsb": (
        "Sentence 1: {first}\nSentence 2: {second}\n"
        "Question: How similar are they, from 0 (unrelated) to 5 (same meaning)?\nAnswer:",
        (" 0", " 1", " 2", " 3", " 4", " 5"),
    ),
    "qqp": (
        "Question 1: {first}\nQuestion 2: {second}\nQuestion: Do both ask the same, yes or no?\nAnswer:",
        (" no", " yes"),
    ),
    "mnli": (_PAIR + "True, false or neither?\nAnswer:", (" true", " neither", " false")),
    "qnli": ('{second}\nQuestion: Does that answer the question "{first}", yes or no?\nAnswer:', (" yes", " no")),
    "rte": (_PAIR + "True or false?\nAnswer:", (" true", " false")),
    "wnli": (_PAIR + "True or false?\nAnswer:", (" false", " true")),
}


@dataclass(frozen=True, kw_only=True)
class GlueSettings(Settings):
    """Where the rows come from."""

    data: str | None = option(None, help="Folder with a folder per task (SST-2, CoLA, ...); None: the Hub.")


@dataclass(frozen=True, kw_only=True)
class GlueClassifierSettings(GlueSettings):
    """How a classifier is asked."""

    max_length: int = option(
        128, help="Longest row, in tokens; the end of longer ones is cut off.", source="common for GLUE", minimum=8
    )


class GlueEval(EvalTask):
    """A task of GLUE, on its validation rows, with the official metrics.

    `mean` is the mean of two metrics, which GLUE takes for a task's score.

    Args:
        task: its name, such as `sst2`.
        settings: fields of `settings_class`.

    Raises:
        ValueError: no such task, or rows that cannot be loaded; see `patchattn.evaluation.load_glue`.
        TypeError: a setting of the wrong type.
    """

    settings_class: ClassVar[type[GlueSettings]] = GlueSettings

    def __init__(self, task: str, **settings: Any) -> None:
        self.task = glue_task(task)
        self.settings: Any = self.settings_class.from_dict(settings)
        self.name = f"glue/{task}"
        self.main_score = MAIN_SCORES.get(task, "accuracy")
        self.rows = validation_rows(task, self.settings.data)

    def __len__(self) -> int:
        return len(self.rows)

    def identity(self) -> Mapping[str, Any]:
        """The settings, but for the place of the files, and a digest of the rows."""
        settings = {key: value for key, value in self.settings.to_dict().items() if key != "data"}
        return {**settings, "rows_sha256": hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()}

    @abstractmethod
    def predictions(self, model: Any, tokenizer: Any, rows: Sequence[tuple[str, str | None]]) -> list[Row]:
        """`prediction` (a label's number, for `stsb` a score), and costs, of pairs of texts."""

    def answer(self, model: Any, tokenizer: Any, indices: Sequence[int]) -> list[Row]:
        """Rows with `label` and `prediction`."""
        rows = [self.rows[index] for index in indices]
        found = self.predictions(model, tokenizer, [(first, second) for first, second, _ in rows])
        return [{"label": row[2], **given} for row, given in zip(rows, found, strict=True)]

    def score(self, rows: Sequence[Row]) -> dict[str, float]:
        """The official metrics, times 100, and their mean where there are two."""
        given, right = (np.array([row[key] for row in rows]) for key in ("prediction", "label"))
        scores = {name: 100 * value for name, value in GLUE_METRICS[self.task.name](given, right).items()}
        return {**scores, "mean": statistics.mean(scores.values())} if len(scores) > 1 else scores

    def values(self, rows: Sequence[Row]) -> list[float] | None:
        """Whether each row is right, where that is what counts."""
        right = [100.0 * (row["prediction"] == row["label"]) for row in rows]
        return right if self.main_score == "accuracy" else None


class GlueClassification(GlueEval):
    """A task of GLUE for a model with a classification head, fine-tuned on that task."""

    kind: ClassVar[ModelKind] = "classifier"
    settings_class = GlueClassifierSettings

    def check_model(self, model: Any, tokenizer: Any) -> None:
        """ValueError for a head that is not one for this task, and a length that the model has no positions for."""
        label_order(self.task.name, model.config)
        if tokenizer.pad_token is None or model.config.get_text_config().pad_token_id is None:
            raise ValueError(
                "The tokenizer or the model's configuration has no padding token: set both, for example to eos."
            )
        known = positions(model)
        if known is not None and known < self.settings.max_length:
            raise ValueError(
                f"{type(model).__name__} has {known} positions, less than max_length={self.settings.max_length}."
            )

    def predictions(self, model: Any, tokenizer: Any, rows: Sequence[tuple[str, str | None]]) -> list[Row]:
        """The class whose logit is highest; for `stsb` the only logit."""
        texts = [[first for first, _ in rows]]
        if len(self.task.texts) == 2:
            texts.append([second or "" for _, second in rows])
        inputs = tokenizer(
            *texts, truncation=True, max_length=self.settings.max_length, padding=True, return_tensors="pt"
        )
        with torch.inference_mode(), measured(model) as cost:
            logits = model(**inputs.to(model.device)).logits.float().cpu()
        order = label_order(self.task.name, model.config)
        found: list[Any] = [order[place] for place in logits.argmax(-1).tolist()] if order else logits[:, 0].tolist()
        lengths = inputs["attention_mask"].sum(-1).tolist()
        return [
            {"prediction": value, "prompt_tokens": length, **cost.row()}
            for value, length in zip(found, lengths, strict=True)
        ]


class GlueLikelihood(GlueEval):
    """A task of GLUE for a causal language model, without examples: the likeliest of the answers to a question.

    For `stsb` it is the mean of 0 to 5, weighted by their likelihoods.
    """

    def check_model(self, model: Any, tokenizer: Any) -> None:
        """ValueError for a model with an encoder, or a tokenizer without padding token."""
        check_generates(model, tokenizer)

    def identity(self) -> Mapping[str, Any]:
        """Beside the rows, the prompt."""
        return {**super().identity(), "prompt": list(PROMPTS[self.task.name])}

    def predictions(self, model: Any, tokenizer: Any, rows: Sequence[tuple[str, str | None]]) -> list[Row]:
        """The likeliest answer's number; prompts that the model has no positions for lose their middle."""
        template, answers = PROMPTS[self.task.name]
        longest = max(len(tokenizer(answer)["input_ids"]) for answer in answers)
        known = positions(model)
        room = None if known is None else known - longest
        prompts, lengths = [], []
        for first, second in rows:
            prompt = template.format(first=first, second=second)
            fitted = fit_prompt(tokenizer, prompt, room=room)
            prompts.append(tokenizer.decode(fitted.tokens, skip_special_tokens=True) if fitted.truncated else prompt)
            lengths.append({"prompt_tokens": len(fitted.tokens), "truncated": fitted.truncated})
        choices = [answers] * len(rows)
        batches = prepare_choices(model, tokenizer, prompts, choices, batch_size=len(rows) * len(answers))
        found: list[Any] = [None] * len(rows)
        with measured(model) as cost:
            for batch in batches:
                for question, scores in zip(batch.questions, score_batch(model, batch), strict=True):
                    found[question] = self._reading(scores)
        return [{"prediction": value, **length, **cost.row()} for value, length in zip(found, lengths, strict=True)]

    def _reading(self, scores: torch.Tensor) -> float | int:
        if self.task.is_regression:
            weights = scores.softmax(-1)
            return float((weights * torch.arange(len(weights))).sum())
        return int(scores.argmax())


def label_order(task: str, config: Any) -> list[int]:
    """GLUE's number of each class of a checkpoint, by the names that its configuration gives them; none for `stsb`.

    Raises:
        ValueError: another number of classes, or names that are not the task's.
    """
    asked = glue_task(task)
    expected = len(asked.labels) or 1
    if config.num_labels != expected:
        raise ValueError(f"glue/{task} needs {expected} class{'es' if expected > 1 else ''}, got {config.num_labels}.")
    if asked.is_regression:
        return []
    names = [str(config.id2label[index]).lower().replace("-", "_").replace(" ", "_") for index in range(expected)]
    known = LABEL_NAMES[task]
    if sorted(names) == sorted(known):
        return [known.index(name) for name in names]
    if names in ([f"label_{index}" for index in range(expected)], [str(index) for index in range(expected)]):
        return list(range(expected))
    raise ValueError(
        f"The checkpoint calls its classes {', '.join(names)}, expected {', '.join(known)} in any order, or label_0, "
        f"... in this one. If it is one for glue/{task}, set config.id2label."
    )
