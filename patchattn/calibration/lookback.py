"""What a Lookback Lens's probe is fitted on: answers to contexts, each with a label, from a file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..inspection.lookback import LookbackProbe, lookback_ratios, lookback_windows
from .few_shot import left_padded
from .records import read_records


@dataclass(frozen=True)
class ContextAnswer:
    """A text `before context between answer`.

    Attributes:
        context: what the answer should keep to.
        answer: the end of the text.
        label: 1 if it does, else 0.
        before, between: what of the prompt is around the context, such as a question.
    """

    context: str
    answer: str
    label: int
    before: str = ""
    between: str = ""


@dataclass(frozen=True, eq=False)
class LookbackFeatures:
    """Rows of features.

    Attributes:
        features: `(N, L * H)`.
        labels: of each.
        contexts: of each the number of its context, alike for alike contexts.
    """

    features: torch.Tensor
    labels: list[int]
    contexts: list[int]


def read_answers(path: str | Path) -> list[ContextAnswer]:
    """Read `.jsonl` or `.tsv` with the fields `context`, `answer`, `label`, and perhaps `before` and `between`.

    Raises:
        ValueError: as `read_records`, or a label that is neither 0 nor 1.
    """
    records = read_records(path, ("context", "answer", "label"), ("before", "between"))
    if wrong := [record["label"] for record in records if record["label"] not in ("0", "1")]:
        raise ValueError(f"{path}: a label is 1, where an answer keeps to its context, or 0; got {wrong[0]!r}.")
    return [ContextAnswer(**{**record, "label": int(record["label"])}) for record in records]  # type: ignore[arg-type]


def lookback_features(
    model: nn.Module,
    tokenizer: Any,
    answers: Sequence[ContextAnswer],
    *,
    window: int | None = None,
    batch_size: int = 8,
    modules: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> LookbackFeatures:
    """Features of labelled answers: what `LookbackProbe.fit` takes.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: of the model; a fast one, which tells where in the text its tokens are.
        answers: texts.
        window: tokens of a row; `None`: a row per answer. Answers that are shorter are one row.
        batch_size: texts of a forward.
        modules: as of `lookback_ratios`.
        progress: called with the number of texts done.

    Raises:
        ValueError: a tokenizer that is not fast, a text whose context or answer has no token; or as `lookback_ratios`.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} does not tell where its tokens are: take a fast tokenizer.")
    if batch_size < 1 or (window is not None and window < 1):
        raise ValueError(f"batch_size and window are at least 1, got {batch_size} and {window}.")
    known: dict[str, int] = {}
    features: list[torch.Tensor] = []
    labels: list[int] = []
    contexts: list[int] = []
    for begin in range(0, len(answers), batch_size):
        some = answers[begin : begin + batch_size]
        built = [_tokens(tokenizer, one) for one in some]
        padding = tokenizer.pad_token_id
        inputs = left_padded([ids for ids, _, _ in built], 0 if padding is None else padding)
        spans, lengths = [span for _, span, _ in built], [length for _, _, length in built]
        for one, ratios in zip(
            some, lookback_ratios(model, inputs, context=spans, answer=lengths, modules=modules), strict=True
        ):
            rows = lookback_windows(ratios, None if window is None else min(window, len(ratios)))
            features.append(rows)
            labels += [one.label] * len(rows)
            contexts += [known.setdefault(one.context, len(known))] * len(rows)
        if progress is not None:
            progress(begin + len(some))
    return LookbackFeatures(torch.cat(features), labels, contexts)


def out_of_fold(
    model: nn.Module,
    features: torch.Tensor,
    labels: Sequence[int],
    groups: Sequence[Any],
    *,
    folds: int = 5,
    modules: str | None = None,
) -> np.ndarray:
    """`(N,)` probability of class 1 of each row, by a probe that was fitted on rows of other groups.

    Raises:
        ValueError: fewer groups than folds, or a fold without both classes among the others.
    """
    from sklearn.model_selection import GroupKFold

    given, found = np.asarray(labels), np.zeros(len(labels))
    for train, test in GroupKFold(folds).split(given, given, list(groups)):
        probe = LookbackProbe.fit(model, features[train], given[train].tolist(), modules=modules)
        found[test] = probe.probability(features[test]).numpy()
    return found


def _tokens(tokenizer: Any, text: ContextAnswer) -> tuple[list[int], tuple[int, int], int]:
    """Ids, where the context is among them, and how many are the answer's."""
    prompt = text.before + text.context + text.between
    found = tokenizer(prompt + text.answer, return_offsets_mapping=True)
    start, stop = len(text.before), len(text.before) + len(text.context)
    places = [place for place, (a, b) in enumerate(found["offset_mapping"]) if a < stop and b > max(a, start)]
    answered = [place for place, (a, b) in enumerate(found["offset_mapping"]) if b > max(a, len(prompt))]
    if not places or not answered or places[-1] >= answered[0]:
        raise ValueError(
            f"The context and the answer need tokens of their own, got {text.context[:40]!r} and {text.answer[:40]!r}."
        )
    ids = found["input_ids"][: answered[-1] + 1]  # without what a tokenizer puts at the end
    return ids, (places[0], places[-1] + 1), len(ids) - answered[0]
