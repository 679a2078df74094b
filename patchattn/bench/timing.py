"""Time and memory: warm-up, medians and quartiles, a cold second-level cache, CUDA events."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

LEAST, MOST = 5, 200  # repeats
ROUNDS = 5  # in which what is compared takes turns; no more than LEAST
FLUSH = 2**28  # bytes, larger than the second-level cache of any GPU so far


class Timing(NamedTuple):
    """Seconds of one run.

    Attributes:
        median, low, high: with the quartiles.
        repeats: how many runs that is of.
    """

    median: float
    low: float
    high: float
    repeats: int


class Stopwatch(Protocol):
    """What takes times."""

    def laps(self, run: Callable[[], Any], count: int) -> list[float]:
        """Seconds of each of so many runs."""
        ...


class CPUStopwatch:
    """Wall time. Caches are left as the run before left them."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock

    def laps(self, run: Callable[[], Any], count: int) -> list[float]:
        times = []
        for _ in range(count):
            start = self.clock()
            run()
            times.append(self.clock() - start)
        return times


class CUDAStopwatch:
    """Time on the GPU between two events; before each run the second-level cache is overwritten."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def laps(self, run: Callable[[], Any], count: int) -> list[float]:
        with torch.cuda.device(self.device):
            dirt = torch.empty(FLUSH, dtype=torch.int8, device=self.device)
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
            for start, end in events:
                dirt.zero_()  # also gives the CPU a lead, so that launches are not what is measured
                start.record()
                run()
                end.record()
            torch.cuda.synchronize(self.device)
            return [start.elapsed_time(end) / 1e3 for start, end in events]


def stopwatch(device: torch.device) -> Stopwatch:
    """The one for a device."""
    return CUDAStopwatch(device) if device.type == "cuda" else CPUStopwatch()


def measure(run: Callable[[], Any], watch: Stopwatch, *, seconds: float) -> Timing:
    """Time a function by itself; as `in_turn`, but for what it raises."""
    (timing,) = in_turn([run], watch, seconds=seconds)
    if isinstance(timing, Exception):
        raise timing
    return timing


def in_turn(runs: Sequence[Callable[[], Any]], watch: Stopwatch, *, seconds: float) -> list[Timing | Exception]:
    """Time functions in turn, so that a device that grows warm or slow meets all of them.

    The first run of each warms up, the next three tell how long one takes, and then as many are timed as fit into the
    time, in ROUNDS rounds.

    Args:
        runs: what is timed.
        watch: takes the times.
        seconds: to spend on each, roughly; between LEAST and MOST runs are timed whatever it is.

    Returns:
        Of each its times, or what it raised.
    """
    times: list[list[float]] = [[] for _ in runs]
    counts = [LEAST] * len(runs)
    failures: dict[int, Exception] = {}
    for number in range(ROUNDS + 1):
        for place, run in enumerate(runs):
            if place in failures:
                continue
            try:
                if number == 0:
                    watch.laps(run, 1)
                    once = statistics.median(watch.laps(run, 3))
                    counts[place] = min(MOST, max(LEAST, int(seconds / max(once, 1e-9))))
                else:
                    share = counts[place] * number // ROUNDS - counts[place] * (number - 1) // ROUNDS
                    times[place] += watch.laps(run, share)
            except Exception as error:
                failures[place] = error
    return [failures[place] if place in failures else _timing(each) for place, each in enumerate(times)]


def _timing(times: list[float]) -> Timing:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median, low, high, len(times))


def as_graph(run: Callable[[], Any]) -> Callable[[], Any]:
    """A CUDA graph of a function, whose launches then cost nothing; raises RuntimeError where it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # lets kernels compile and libraries set up outside the capture
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def peak_memory(run: Callable[[], Any], device: torch.device, before: int) -> int | None:
    """Bytes allocated at the peak of one run, operands among them; `None` on a CPU, where it is not measured.

    Args:
        run: the function.
        device: where it runs.
        before: bytes that were allocated before the operands were.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
