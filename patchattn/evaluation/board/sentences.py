"""What a row of a board has shown, in a sentence."""

from ..report.report import number
from .measured import Difference, Measured, cost, difference, in_percent, partner, pooled
from .plan import DENSE


def shown(name: str, row: Measured, dense: Measured) -> str:
    """What differs from dense by more than twice its standard error, and what does not; what is saved for it.

    Args:
        name: of the row.
        row: of `read_rows`.
        dense: the unpatched model's.
    """
    if name == DENSE:
        return "What all others are compared with."
    if "refused" in row:
        return f"Refused: {row['refused']}"
    parts = [*_differences(row, dense), *_saved(row, dense)]
    if (other := partner(row)) is not None:
        parts.append(f"**beside {other}**: " + "; ".join(_differences(row, dense, beside=True)))
    return "; ".join(parts) + "."


def change(found: Difference) -> str:
    """A difference with its error, for tables."""
    text = number(found.mean, sign=True)
    return text if found.error is None else f"{text} ± {number(found.error)}"


def _differences(row: Measured, dense: Measured, *, beside: bool = False) -> list[str]:
    """To dense, or to the row that this one is beside."""
    percent = in_percent(dense)
    mean = pooled(row, percent, beside=beside)
    parts = ["No task in percent was scored" if mean is None else _said("mean of tasks", mean, "points", lower=False)]
    found = {task: difference(row, task, beside=beside) for task in dense["tasks"]}
    apart = [(task, one) for task, one in found.items() if one is not None and task in percent and one.is_shown]
    if apart:
        listed = sorted(apart, key=lambda item: item[1].mean)
        parts.append("apart: " + ", ".join(f"{task} {change(one)}" for task, one in listed))
    for task, one in found.items():
        if one is not None and task not in percent and not row["tasks"][task].get("as_dense"):
            about = dense["tasks"][task]
            parts.append(_said(task, one, about["unit"], lower=not about["higher_is_better"]))
    return parts


def _said(what: str, found: Difference, unit: str, *, lower: bool) -> str:
    figures = f"{change(found)} {unit}".strip()
    if not found.is_shown:
        return f"{what}: no difference shown ({figures})"
    return f"{what}: {'better' if (found.mean < 0) == lower else 'worse'} by {figures}"


def _saved(row: Measured, dense: Measured) -> list[str]:
    names = {
        "kv cache": "the kv cache takes {} of its bytes",
        "prompt density": "{} of the keys are read of a prompt",
        "decode density": "{} of the keys are read while decoding",
        "parameters": "{} of the parameters",
    }
    return [
        text.format(f"{100 * value:.0f} %")
        for name, text in names.items()
        if (value := cost(row, name, dense)) is not None and abs(value - 1) >= 0.005
    ]
