"""How fast rows of a board are: in turn with dense, in one run."""

import statistics
from collections.abc import Sequence
from typing import Any

from ...core.patching import unpatched
from ...saving.trained import holds_adapter, holds_patch
from ..run.compare import patched_run
from ..tasks.speed import SpeedTask
from ..tasks.task import Row
from .plan import BoardPlan, BoardRow

KEYS = ("first_token_seconds", "tokens_per_second")


def row_speed(model: Any, tokenizer: Any, plan: BoardPlan, row: BoardRow) -> dict[str, Any]:
    """Of dense and of the row, run in turn, the first of both left out, every run and their medians; and the ratios.

    Args:
        model: unpatched, in evaluation mode.
        tokenizer: of the model.
        plan: whose `speed` says prompts and repeats.
        row: to be timed.

    Returns:
        `dense` and `patched`, each `first_token_seconds` and `tokens_per_second` with the values of `runs` and their
        `median`; and `ratio`, how many times as fast as dense the row is in `prefill` and `decode`, of the medians,
        with the least and the greatest of the ratios turn by turn. Or `refused`, why the model cannot have the row.
        A LoRA adapter merges into weights, so what comes with one is timed without it; `as_dense` says that there is
        nothing else.
    """
    if row.patch is not None and holds_adapter(row.patch) and not holds_patch(row.patch):
        return {"as_dense": True}
    task, rounds = plan.speed_task(), plan.repeats + 1
    everything = range(len(task))
    dense, patched = [], []
    try:
        with patched_run(model, row.run, plan.seed, adapter=False):
            for _ in range(rounds):
                with unpatched(model):
                    dense.append(task.answer(model, tokenizer, everything))
                patched.append(task.answer(model, tokenizer, everything))
    except (NotImplementedError, ValueError) as error:
        return {"refused": str(error)}
    before, after = (_figures(task, runs[1:]) for runs in (dense, patched))
    waits, rates = ((before[key]["runs"], after[key]["runs"]) for key in KEYS)
    return {
        "dense": before,
        "patched": after,
        "ratio": {
            "prefill": _ratio(before[KEYS[0]]["median"], after[KEYS[0]]["median"], *waits),
            "decode": _ratio(after[KEYS[1]]["median"], before[KEYS[1]]["median"], *reversed(rates)),
        },
    }


def _figures(task: SpeedTask, runs: Sequence[Sequence[Row]]) -> dict[str, dict[str, Any]]:
    scores = [task.score(rows) for rows in runs]
    values = {key: [score[key] for score in scores] for key in KEYS}
    return {key: {"runs": given, "median": statistics.median(given)} for key, given in values.items()}


def _ratio(above: float, below: float, aboves: Sequence[float], belows: Sequence[float]) -> dict[str, float]:
    turns = [one / other for one, other in zip(aboves, belows, strict=True)]
    return {"median": above / below, "least": min(turns), "greatest": max(turns)}
