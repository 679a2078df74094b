"""The scores of POPE (arXiv 2305.10355, Section 4) as a module of the `evaluate` library.

    Pope().compute(predictions=["Yes, there is.", "No"], references=["yes", "yes"])["recall"]  # 0.5

`evaluate.load(path_of_this_file)` gives the same object; nothing is fetched for it. That is why this file stands alone:
`evaluate` copies it.
"""

import re
from collections.abc import Sequence

try:
    import datasets
    import evaluate
except ImportError as error:
    raise ImportError(f'The scores of POPE need {error.name}: pip install "patchattn[eval]"') from error

_NO = frozenset({"No", "no", "not"})  # as the official evaluation spells them


def says_no(answer: str) -> bool:
    """Whether the official rule takes an answer for "no"; whatever it does not is a "yes".

    The text up to the first full stop, without commas, is split at spaces. One of `No`, `no`, `not` among the pieces
    makes it a "no". So "There isn't one", "NO", "No!" and an empty answer are all taken for "yes".
    """
    return not _NO.isdisjoint(answer.partition(".")[0].replace(",", "").split(" "))


def is_neither(answer: str) -> bool:
    """Whether an answer counts as "yes" although its first sentence does not hold that word, in any spelling."""
    return not says_no(answer) and "yes" not in re.findall(r"\w+", answer.partition(".")[0].lower())


def pope_scores(answers: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """What the answers to yes/no questions are worth; "yes" is the positive class.

    Args:
        answers: of the model, as it wrote them.
        labels: `yes` or `no`.

    Returns:
        Shares from 0 to 1: `accuracy`, `precision`, `recall` and `f1` (0 where there is nothing to divide by),
        `yes_ratio` (answers taken for "yes"), and `neither_ratio` (answers taken for "yes" that do not say it; see
        `is_neither`). The last is not a score of POPE: where it is not near 0, the others rest on the rule's leniency.

    Raises:
        ValueError: no answers, numbers that differ, or a label of another kind.
    """
    if not answers or len(answers) != len(labels):
        raise ValueError(f"Give one label per answer and at least one, got {len(answers)} and {len(labels)}.")
    if strange := next((label for label in labels if label not in ("yes", "no")), None):
        raise ValueError(f"A label must be 'yes' or 'no', got {strange!r}.")
    said = [not says_no(answer) for answer in answers]
    true = [label == "yes" for label in labels]
    hits = sum(s and t for s, t in zip(said, true, strict=True))
    return {
        "accuracy": sum(s == t for s, t in zip(said, true, strict=True)) / len(said),
        "precision": hits / max(sum(said), 1),
        "recall": hits / max(sum(true), 1),
        "f1": 2 * hits / max(sum(said) + sum(true), 1),
        "yes_ratio": sum(said) / len(said),
        "neither_ratio": sum(map(is_neither, answers)) / len(said),
    }


class Pope(evaluate.Metric):
    """POPE's scores of a list of answers; see `pope_scores`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Accuracy, precision, recall, F1 and yes-ratio of answers to questions after objects.",
            citation="Li et al.: Evaluating Object Hallucination in Large Vision-Language Models, EMNLP 2023.",
            inputs_description="predictions: answers as the model wrote them. references: yes or no.",
            features=datasets.Features({"predictions": text, "references": text}),
            reference_urls=["https://arxiv.org/abs/2305.10355"],
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return pope_scores(list(predictions), list(references))
