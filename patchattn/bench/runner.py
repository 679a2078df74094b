"""Run a case: every implementation is verified, and only then are they timed, in turn."""

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from patchattn_kernels.tuning import tuning

from .attention import no_kernel, ran_triton
from .cases import Case
from .ceilings import Ceilings
from .problem import Implementation, Outcome, Problem, UnavailableError
from .registry import PROBLEMS
from .result import Result, Status
from .timing import Stopwatch, Timing, as_graph, in_turn, peak_memory, stopwatch


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
    """Results of a case, one per implementation, in their order.

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
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    torch._dynamo.reset()  # what other cases compiled counts against the number of shapes that a function may have
    prepared: list[Result | _Ready] = []
    for implementation in chosen:
        if time.monotonic() > deadline:
            prepared.append(Result(case, implementation.name, "not run", "the time limit was reached"))
            continue
        prepared.append(_Single(problem, implementation, tune, before, held).prepared())
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
    ready = [each for each in prepared if isinstance(each, _Ready)]
    runs = [run for each in ready for run in each.runs]
    timings = iter(in_turn(runs, watch or stopwatch(device), seconds=seconds))
    for each in prepared:
        yield each if isinstance(each, Result) else each.result([next(timings) for _ in each.runs], facts)


@dataclass
class _Ready:
    """An implementation that was verified.

    Attributes:
        result: from the times of its `runs`, and what else is known of the case.
        runs: what is timed: itself, and where that is of interest a CUDA graph of it.
    """

    result: Callable[[list[Timing | Exception], dict[str, Any]], Result]
    runs: list[Callable[[], Any]]


class _Single:
    """One implementation of one problem."""

    def __init__(self, problem: Problem, implementation: Implementation, tune: bool, before: int, held: int) -> None:
        self.problem, self.implementation, self.tune = problem, implementation, tune
        self.before, self.held = before, held

    def prepared(self) -> Result | _Ready:
        """Itself, verified; or what came of that. Whatever goes wrong is a result: the others are to be measured."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                return self._verified()
            except Exception as error:
                return self._failed(error, [str(w.message) for w in caught if "because" in str(w.message)])

    def _failed(self, error: Exception, because: Sequence[str] = ()) -> Result:
        status: Status = "failed"
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, UnavailableError):
            status, reason = "unavailable", str(error)
        elif isinstance(error, torch.OutOfMemoryError):
            status, reason = "out of memory", str(error)
        elif self.implementation.kernel is None and no_kernel(error):
            status, reason = "unavailable", " ".join([str(error), *because])
        return Result(self.problem.case, self.implementation.name, status, " ".join(reason.split())[:300])

    def _verified(self) -> Result | _Ready:
        case, device, name = self.problem.case, self.problem.device, self.implementation.name
        gpu = device.type == "cuda"
        # what the others keep for their turns, graphs above all, is not this one's memory
        before = self.before + (torch.cuda.memory_allocated(device) - self.held if gpu else 0)
        run, leeway = self.implementation.make(self.problem), self.implementation.leeway
        if self.tune and self.implementation.kernel:
            with tuning():
                run()
        with poisoned() if self.implementation.kernel else nullcontext():
            outcome = run()
        dtype = str(next(iter(outcome.values())).dtype).removeprefix("torch.")
        check = self.problem.check(self.implementation.computes, outcome)
        del outcome
        runs, graphed = [run], False
        if check.passes(leeway) and gpu and (case.mode == "decode" or case.is_short):
            replay, graphed = _graphed(run)
            check = self.problem.check(self.implementation.computes, replay())
            if graphed:
                runs = [replay] if case.mode == "decode" else [run, replay]
        errors: dict[str, Any] = {"error": check.error, "torch_error": check.torch_error}
        if not check.passes(leeway):
            reason = (
                f"{check.what} is off by {check.error:.2g} of the largest value; {check.allowed(leeway):.2g} is allowed"
            )
            return Result(case, name, "wrong", reason, dtype=dtype, **errors)
        memory = peak_memory(run, device, before)  # a graph has its memory beforehand

        def result(timings: list[Timing | Exception], facts: dict[str, Any]) -> Result:
            timing, *replayed = timings
            if isinstance(timing, Exception):
                return self._failed(timing)
            return Result(
                case,
                name,
                "measured",
                seconds=timing.median,
                low=timing.low,
                high=timing.high,
                repeats=timing.repeats,
                graphed=graphed and not replayed,
                graph_seconds=next((each.median for each in replayed if isinstance(each, Timing)), None),
                dtype=dtype,
                peak_memory=memory,
                kernel=self._kernel(),
                **errors,
                **facts,
            )

        return _Ready(result, runs)

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
    """A call as a CUDA graph, where it can be one: eagerly, launches would be most of what is measured."""
    try:
        return as_graph(run), True
    except RuntimeError:
        torch.cuda.synchronize()
        return run, False
