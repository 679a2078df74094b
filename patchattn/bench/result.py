"""One result of the benchmark."""

from dataclasses import dataclass
from typing import Literal

from .cases import Case

Status = Literal["measured", "unavailable", "wrong", "out of memory", "failed", "not run"]


@dataclass(frozen=True)
class Result:
    """One implementation on one case.

    Attributes:
        case: which.
        implementation: its name.
        status: whether it was measured, or why not; `reason` says more.
        seconds: median of one run, and its quartiles `low` and `high`, of so many `repeats`.
        graphed: a CUDA graph was replayed, so that launches cost nothing.
        graph_seconds: median of one replay of a CUDA graph, where `seconds` are without: of short prefills.
        dtype: of the output.
        peak_memory: bytes, operands among them; `None` on a CPU.
        useful_flops: of the case, in one run; what an implementation computes besides does not count.
        floor: seconds that the case takes at least on this device.
        error, torch_error: on the checked slice, relative to its largest value; torch's own is SDPA's.
        kernel: `Triton` or `plain torch`, for our own operations.
    """

    case: Case
    implementation: str
    status: Status
    reason: str = ""
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    repeats: int = 0
    graphed: bool = False
    graph_seconds: float | None = None
    dtype: str = ""
    peak_memory: int | None = None
    useful_flops: float | None = None
    floor: float | None = None
    error: float | None = None
    torch_error: float | None = None
    kernel: str = ""

    @property
    def useful_tflops(self) -> float | None:
        """TFLOP/s against the useful work."""
        return None if self.seconds is None or self.useful_flops is None else self.useful_flops / self.seconds / 1e12

    @property
    def share_of_ceiling(self) -> float | None:
        """Floor over time: 1 is as fast as the device can be."""
        return None if self.seconds is None or self.floor is None else self.floor / self.seconds
