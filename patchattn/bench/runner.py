"""Run a case: every implementation is verified, and only then timed."""

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from patchattn_kernels.tuning import tuning

from .attention import no_kernel, ran_triton
from .cases import Case
from .ceilings import Ceilings
from .problem import Implementation, Outcome, Problem, UnavailableError
from .registry import PROBLEMS
from .result import Result, Status
from .timing import Stopwatch, as_graph, measure, peak_memory, stopwatch


def run_case(
    case: Case,
    device: torch.device,
    ceilings: Ceilings,
    *,
    seconds: float = 0.5,
    deadline: float = float("inf"),
    tune: bool = False,
    implementations: Sequence[Implementation] | None = None,
    watch: Stopwatch | None = None,
) -> Iterator[Result]:
    """Results of a case, one per implementation, in the order they are made.

    Args:
        case: which.
        device: where.
        ceilings: of the device.
        seconds: to spend on timing each implementation.
        deadline: on `time.monotonic`; implementations that have not begun then are not run, and say so.
        tune: let our own operations choose their launch settings first, where none are known for the shape.
        implementations: instead of the problem's own.
        watch: instead of the device's stopwatch.
    """
    chosen = PROBLEMS[case.op].implementations if implementations is None else implementations
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    try:
        problem = PROBLEMS[case.op](case, device)
        work = problem.work()
    except torch.OutOfMemoryError:
        yield from (Result(case, each.name, "out of memory", "already the operands") for each in chosen)
        return
    facts = {"useful_flops": work.flops, "floor": ceilings.floor(work, case.dtype)}
    for implementation in chosen:
        if time.monotonic() > deadline:
            yield Result(case, implementation.name, "not run", "the time limit was reached")
            continue
        single = _Single(problem, implementation, tune, seconds, watch or stopwatch(device), before)
        yield single.result(facts)
        del single
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


class _Single:
    """One implementation of one problem."""

    def __init__(
        self,
        problem: Problem,
        implementation: Implementation,
        tune: bool,
        seconds: float,
        watch: Stopwatch,
        before: int,
    ) -> None:
        self.problem, self.implementation, self.tune = problem, implementation, tune
        self.seconds, self.watch, self.before = seconds, watch, before

    def result(self, facts: dict[str, Any]) -> Result:
        """What came of it. Whatever goes wrong is a result too: the others are to be measured all the same."""
        status: Status
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                return self._measured(facts)
            except UnavailableError as error:
                status, reason = "unavailable", str(error)
            except torch.OutOfMemoryError as error:
                status, reason = "out of memory", str(error)
            except Exception as error:
                known = self.implementation.kernel is None and no_kernel(error)
                status = "unavailable" if known else "failed"
                because = [str(w.message) for w in caught if "because" in str(w.message)] if known else []
                reason = " ".join([f"{'' if known else type(error).__name__ + ': '}{error}", *because])
        return Result(self.problem.case, self.implementation.name, status, " ".join(reason.split())[:300])

    def _measured(self, facts: dict[str, Any]) -> Result:
        case, device, name = self.problem.case, self.problem.device, self.implementation.name
        run, leeway = self.implementation.make(self.problem), self.implementation.leeway
        if self.tune and self.implementation.kernel:
            with tuning():
                run()
        with poisoned() if self.implementation.kernel else nullcontext():
            outcome = run()
        check = self.problem.check(self.implementation.computes, outcome)
        del outcome
        graphed, ungraphed = False, run
        if check.passes(leeway) and case.mode == "decode" and device.type == "cuda":
            run, graphed = _graphed(run)
            check = self.problem.check(self.implementation.computes, run())
        errors: dict[str, Any] = {"error": check.error, "torch_error": check.torch_error}
        if not check.passes(leeway):
            reason = (
                f"{check.what} is off by {check.error:.2g} of the largest value; {check.allowed(leeway):.2g} is allowed"
            )
            return Result(case, name, "wrong", reason, **errors)
        memory = peak_memory(ungraphed, device, self.before)  # a graph has its memory beforehand
        timing = measure(run, self.watch, seconds=self.seconds)
        return Result(
            case,
            name,
            "measured",
            seconds=timing.median,
            low=timing.low,
            high=timing.high,
            repeats=timing.repeats,
            graphed=graphed,
            peak_memory=memory,
            kernel=self._kernel(),
            **errors,
            **facts,
        )

    def _kernel(self) -> str:
        kernel = self.implementation.kernel
        if kernel is None or kernel == "layer":
            return ""
        return "Triton" if ran_triton(kernel, self.problem.device) else "plain torch"


@contextmanager
def poisoned() -> Iterator[None]:
    """Within this block, torch allocates memory full of NaN: what a kernel forgets to write cannot pass for right."""
    settings: Any = torch.utils.deterministic
    algorithms, before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # without it nothing is filled
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(algorithms, warn_only=warns)


def _graphed(run: Callable[[], Outcome]) -> tuple[Callable[[], Outcome], bool]:
    """A decoding step as a CUDA graph, where it can be one: eagerly, launches would be all that is measured."""
    try:
        return as_graph(run), True
    except RuntimeError:
        torch.cuda.synchronize()
        return run, False
