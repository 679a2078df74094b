"""How sure a score is: standard errors, those of differences in pairs."""

import math
from collections.abc import Sequence

import numpy as np

from ..tasks.task import EvalTask, Row

DRAWS = 200  # of the bootstrap: the error is then known to 5 %


def standard_error(task: EvalTask, rows: Sequence[Row], beside: Sequence[Row] | None = None) -> float | None:
    """Standard error of a task's main score, as samples go: another draw of them would move it by so much.

    Where the score is the mean of a value per sample (`EvalTask.values`), it is the error of that mean; else that of
    the bootstrap over samples, with a fixed seed.

    Args:
        task: that gave the rows.
        rows: answers to all samples, in their order.
        beside: another model's answers to the same samples: the error is that of the difference, sample by sample,
            which is far smaller than the two scores' own where both models find the same samples hard.

    Returns:
        The error in the score's unit; None where there are fewer than two samples, they are no draws of one kind
        (`EvalTask.samples_are_draws`), or the score of some draws is not a number.
    """
    if not task.samples_are_draws or len(rows) < 2:
        return None
    values, others = task.values(rows), None if beside is None else task.values(beside)
    if values is not None:
        apart = np.asarray(values, float) - (0.0 if others is None else np.asarray(others, float))
        return float(apart.std(ddof=1) / math.sqrt(len(apart)))

    def score(given: Sequence[Row], places: np.ndarray) -> float:
        return task.score([given[place] for place in places])[task.main_score]

    draws = np.random.default_rng(0).integers(len(rows), size=(DRAWS, len(rows)))
    found = [score(rows, places) - (0.0 if beside is None else score(beside, places)) for places in draws]
    return float(np.std(found, ddof=1)) if np.isfinite(found).all() else None
