"""Multiple choice and classification by the likelihood that a causal language model gives to each answer."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from ...core.selection import input_device
from ...files.documents import json_lines, quoted, read_text

Normalise = Literal["none", "tokens", "characters"]


@dataclass(frozen=True)
class ChoiceExample:
    """One question.

    Attributes:
        prompt: what comes before the answer.
        choices: the answers, with the space or line break that belongs before them.
        label: index of the right one.
    """

    prompt: str
    choices: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class ChoiceBatch:
    """Questions that are scored in one forward.

    Attributes:
        inputs: `input_ids`, `attention_mask` and, where the model takes them, `position_ids`, left-padded `(R, T)`.
        questions: their indices in the order given.
        rows: per question and choice, the row of `inputs` that it is scored in; equal inputs are one row.
        targets: per question and choice, the tokens that are scored: the last inputs predict them.
        lengths: per question and choice, what its score is divided by.
    """

    inputs: dict[str, torch.Tensor]
    questions: list[int]
    rows: list[list[int]]
    targets: list[list[list[int]]]
    lengths: list[list[int]]


def read_choices(path: str | Path) -> list[ChoiceExample]:
    """Read JSON lines of `{"prompt": ..., "choices": [...], "label": int}`.

    Raises:
        ValueError: no file, no example, or a line that is none; the message says which.
    """
    found = []
    for number, row in json_lines(read_text(path), path, skip_empty=True):
        if not isinstance(row, dict) or not {"prompt", "choices", "label"} <= set(row):
            raise ValueError(f"{path}, line {number} must have prompt, choices and label, got {quoted(row)}.")
        prompt, choices, label = row["prompt"], row["choices"], row["label"]
        texts = [prompt, *choices] if isinstance(choices, list) else []
        if len(texts) < 3 or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{path}, line {number}: prompt must be a text and choices a list of two or more.")
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
            raise ValueError(f"{path}, line {number}: label must be 0 to {len(choices) - 1}, got {quoted(label)}.")
        found.append(ChoiceExample(prompt, tuple(choices), label))
    if not found:
        raise ValueError(f"{path} holds no example.")
    return found


def score_choices(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
    *,
    normalise: Normalise = "none",
    batch_size: int = 8,
) -> list[torch.Tensor]:
    """Log-likelihood of every choice after its prompt.

    The choices of a question are scored from one place on: behind the longest run of tokens that prompt and all texts
    of prompt and choice have in common. So a token that the tokenizer makes of the prompt's end and a choice's start is
    scored whole, and for all of them.

    Args:
        model: a causal language model, in evaluation mode.
        tokenizer: its tokenizer.
        prompts: one per question.
        choices: the choices of each, with the space that belongs before them.
        normalise: divide by the number of tokens scored, or of characters of the choice; or take the sum.
        batch_size: most rows of a forward, unless one question has more.

    Returns:
        Per question, the scores of its choices `(C,)`, float64.

    Raises:
        ValueError: lengths that differ, an empty choice, a first token that nothing comes before.
    """
    batches = prepare_choices(model, tokenizer, prompts, choices, normalise=normalise, batch_size=batch_size)
    scores: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
    for batch in batches:
        for question, score in zip(batch.questions, score_batch(model, batch), strict=True):
            scores[question] = score
    return scores


def prepare_choices(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
    *,
    normalise: Normalise = "none",
    batch_size: int = 8,
) -> list[ChoiceBatch]:
    """What `score_choices` scores, as batches of questions of like length; takes and raises what it does."""
    if len(prompts) != len(choices):
        raise ValueError(f"Every prompt needs its choices, got {len(prompts)} prompts and {len(choices)}.")
    if normalise not in get_args(Normalise):
        raise ValueError(f"normalise must be one of {get_args(Normalise)}, got {normalise!r}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    texts = [_tokenize(tokenizer, prompt, given) for prompt, given in zip(prompts, choices, strict=True)]
    order = sorted(range(len(texts)), key=lambda i: max(map(len, texts[i][0])))
    batches: list[ChoiceBatch] = []
    rows: dict[tuple[int, ...], int] = {}
    taken: list[int] = []
    for question in order:
        inputs = {tuple(tokens[:-1]) for tokens in texts[question][0]}
        if taken and len(rows.keys() | inputs) > batch_size:
            batches.append(_batch(taken, rows, texts, choices, normalise, takes_positions))
            rows, taken = {}, []
        for tokens in texts[question][0]:  # the last token is only predicted
            rows.setdefault(tuple(tokens[:-1]), len(rows))
        taken.append(question)
    if taken:
        batches.append(_batch(taken, rows, texts, choices, normalise, takes_positions))
    return batches


@torch.no_grad()
def score_batch(model: nn.Module, batch: ChoiceBatch) -> list[torch.Tensor]:
    """The scores of a batch's questions, `(C,)` each, in one forward."""
    device = input_device(model)
    inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
    logits = model(**inputs, use_cache=False).logits
    scores = []
    for rows, targets, lengths in zip(batch.rows, batch.targets, batch.lengths, strict=True):
        totals = []
        for row, target, length in zip(rows, targets, lengths, strict=True):
            log_p = logits[row, -len(target) :].double().log_softmax(dim=-1)
            totals.append(log_p.gather(-1, torch.tensor(target, device=device)[:, None]).sum() / length)
        scores.append(torch.stack(totals).cpu())
    return scores


def accuracy(scores: Sequence[torch.Tensor], labels: Sequence[int]) -> float:
    """Share of questions whose right choice scores highest; the first wins a tie."""
    return sum(int(score.argmax()) == label for score, label in zip(scores, labels, strict=True)) / len(labels)


def _tokenize(tokenizer: Any, prompt: str, choices: Sequence[str]) -> tuple[list[list[int]], int]:
    """Tokens of prompt and choice, for every choice, and the first one that is scored."""
    if not choices or not all(choices):
        raise ValueError(f"A question needs choices that are not empty, got {list(choices)!r} for {prompt[-40:]!r}.")
    alone = tokenizer(prompt)["input_ids"]
    texts = [list(tokenizer(prompt + choice)["input_ids"]) for choice in choices]
    start = min(_common(alone, text) for text in texts)
    if start == 0:
        raise ValueError(
            f"Nothing comes before the first token of {choices[0]!r}: give a prompt, or a tokenizer that starts texts "
            "with a token of its own."
        )
    if any(len(text) == start for text in texts):
        raise ValueError(f"The tokenizer makes nothing of one of the choices {list(choices)!r}.")
    return texts, start


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the run of equal tokens at the start."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _batch(
    questions: list[int],
    rows: dict[tuple[int, ...], int],
    texts: list[tuple[list[list[int]], int]],
    choices: Sequence[Sequence[str]],
    normalise: Normalise,
    takes_positions: bool,
) -> ChoiceBatch:
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for tokens, row in rows.items():
        ids[row, width - len(tokens) :] = torch.tensor(tokens)
        mask[row, width - len(tokens) :] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if takes_positions:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    targets = [[tokens[texts[q][1] :] for tokens in texts[q][0]] for q in questions]
    sizes = {"none": lambda c, t: 1, "tokens": lambda c, t: len(t), "characters": lambda c, t: len(c)}
    lengths = [
        [sizes[normalise](choice, target) for choice, target in zip(choices[q], row, strict=True)]
        for q, row in zip(questions, targets, strict=True)
    ]
    places = [[rows[tuple(tokens[:-1])] for tokens in texts[q][0]] for q in questions]
    return ChoiceBatch(inputs, questions, places, targets, lengths)
