"""What the kernels are to reach on an H200 in bfloat16, and whether results reach it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from . import cases
from .attention import DENSE
from .cases import Case
from .result import Result

OURS = ("patchattn",)
FLASH = ("SDPA flash",)
EAGER = ("eager N x N",)


@dataclass(frozen=True)
class Goal:
    """A bound on a ratio of two figures of one case.

    Attributes:
        text: what it is, in words.
        case: where.
        of, over: implementations whose figures are divided; the best one of several.
        bound: of the ratio.
        sense: `at least` or `at most`.
        figure: time, or peak memory.
    """

    text: str
    case: Case
    of: tuple[str, ...]
    over: tuple[str, ...]
    bound: float
    sense: Literal["at least", "at most"] = "at least"
    figure: Literal["seconds", "peak_memory"] = "seconds"


@dataclass(frozen=True)
class Verdict:
    """A goal, what was measured, and whether it is met; `measured` is `None`, with a reason, where it was not."""

    goal: str
    wanted: str
    measured: float | None
    met: bool | None
    reason: str = ""


GOALS = (
    Goal("routed, 50 % active, causal prefill of 8k: times faster than flash SDPA", cases.ROUTED, FLASH, OURS, 1.8),
    Goal("the same: times faster than the best SDPA backend", cases.ROUTED, DENSE, OURS, 1.3),
    Goal("the same, forward and backward: times faster than flash SDPA", cases.ROUTED_TRAINING, FLASH, OURS, 1.5),
    Goal("routed, 100 % active: speed relative to flash SDPA", cases.ALL_ROUTED, FLASH, OURS, 0.9),
    Goal(
        "routed decoding, MHA, 16k keys, 50 %: times faster than the best SDPA backend",
        cases.ROUTED_DECODING,
        DENSE,
        OURS,
        1.7,
    ),
    Goal("ACT forward, 8k: time relative to the dense flash forward", cases.ACT, OURS, FLASH, 2.2, "at most"),
    Goal("the same: times faster than eager", cases.ACT, EAGER, OURS, 8.0),
    Goal("the same: peak memory relative to eager", cases.ACT, OURS, EAGER, 0.05, "at most", "peak_memory"),
    Goal(
        "heads of 64 sinks and 256 recent keys, prefill of 32k: times faster than the best SDPA backend",
        cases.BLOCK_SPARSE,
        DENSE,
        OURS,
        20.0,
    ),
)


def judged(results: Sequence[Result], goals: Sequence[Goal] = GOALS) -> list[Verdict]:
    """What results say of each goal; never more than they do."""
    return [_judge(goal, results) for goal in goals]


def _judge(goal: Goal, results: Sequence[Result]) -> Verdict:
    wanted = f"{goal.sense} {goal.bound:g}"
    figures = []
    for names in (goal.of, goal.over):
        figure, reason = _best(goal, names, results)
        if figure is None:
            return Verdict(goal.text, wanted, None, None, reason)
        figures.append(figure)
    ratio = figures[0] / figures[1]
    met = ratio >= goal.bound if goal.sense == "at least" else ratio <= goal.bound
    return Verdict(goal.text, wanted, ratio, met)


def _best(goal: Goal, names: tuple[str, ...], results: Sequence[Result]) -> tuple[float | None, str]:
    """The smallest figure of some implementations, or why there is none.

    One that cannot run there is not a rival; one that failed or was not reached might have been the best.
    """
    figures, reasons = [], []
    for name in names:
        found = [row for row in results if row.case == goal.case and row.implementation == name]
        if not found:
            return None, "not measured"
        row = found[-1]
        figure = getattr(row, goal.figure)
        if row.status == "measured" and figure is not None:
            figures.append(float(figure))
        elif row.status == "unavailable":
            reasons.append(f"{name} is unavailable: {row.reason}")
        else:
            return None, f"{name}: {row.status}"
    return (min(figures), "") if figures else (None, "; ".join(reasons))
