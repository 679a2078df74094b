"""What a call of the benchmark runs."""

from collections.abc import Sequence
from typing import NamedTuple

from .cases import Case, suite
from .goals import GOALS
from .problem import Implementation
from .registry import PROBLEMS


class Step(NamedTuple):
    """A case, the implementations that are compared in it, and which goals it answers."""

    case: Case
    implementations: tuple[Implementation, ...]
    answers: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """Of the implementations."""
        return [each.name for each in self.implementations]


def plan(suite_name: str, ops: Sequence[str] = ()) -> list[Step]:
    """The steps of a suite.

    Args:
        suite_name: as of `suite`; or `quick`, which has all that the goals compare and nothing else.
        ops: names of operations; all by default.

    Raises:
        ValueError: as `suite`; or no goal compares any of the operations.
    """
    quick = suite_name == "quick"
    steps = []
    for case in suite("goals" if quick else suite_name, tuple(ops)):
        goals = [goal for goal in GOALS if goal.case == case]
        implementations = tuple(PROBLEMS[case.op].implementations)
        if quick:
            compared = {name for goal in goals for name in (*goal.of, *goal.over)}
            implementations = tuple(each for each in implementations if each.name in compared)
        if implementations:
            steps.append(Step(case, implementations, tuple(goal.text for goal in goals)))
    if not steps:
        raise ValueError(f"No goal compares {' or '.join(ops)}: leave out --quick, or name another operation.")
    return steps
