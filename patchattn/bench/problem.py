"""What every operation of the benchmark is: a problem with operands, implementations, useful work and a check."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .cases import Case

Outcome = Mapping[str, torch.Tensor]
# How many times the error of torch's own kernel an implementation may make: what we ask of ours; what kernels that are
# right reach by chance, since the largest of many errors is compared; what rounding the weights to bfloat16 makes.
OURS, OTHERS, EAGER = 2.0, 4.0, 8.0
ROUNDING = 1e-5  # of the largest value: what an implementation may be off where torch's own kernel is exact


class UnavailableError(Exception):
    """An implementation cannot compute this case here; the message says why."""


@dataclass(frozen=True)
class Work:
    """What an operation cannot do without.

    Attributes:
        flops: of the pairs that count.
        bytes: of the operands that must be read, and of the results that must be written.
    """

    flops: float
    bytes: float


@dataclass(frozen=True)
class Check:
    """How far an implementation is off on a slice, relative to the largest value there.

    Attributes:
        error: largest difference from float64.
        torch_error: that of torch's own kernel (SDPA), on the same operands in the same dtype.
        what: which of its results that is.
    """

    error: float
    torch_error: float
    what: str = "output"

    def allowed(self, leeway: float) -> float:
        """So many times the error of torch's own kernel, and a rounding."""
        return leeway * self.torch_error + ROUNDING

    def passes(self, leeway: float) -> bool:
        """False for an error that is not a number, too."""
        return self.error <= self.allowed(leeway)


@dataclass(frozen=True)
class Implementation:
    """One way to compute a case.

    Attributes:
        name: in tables.
        make: from a problem to a function that computes it once; raises `UnavailableError` where it cannot. What
            it does before it returns is not timed.
        computes: what its result is; the problem knows the truth of each.
        kernel: name of the operation of `patchattn_kernels` that this is, if it is one of ours.
        leeway: how many times the error of torch's own kernel it may make; see OURS, OTHERS and EAGER.
    """

    name: str
    make: Callable[[Any], Callable[[], Outcome]]
    computes: str
    kernel: str | None = None
    leeway: float = OTHERS


class Problem(ABC):
    """The operands of a case on a device; they are made in the constructor."""

    implementations: ClassVar[Sequence[Implementation]]

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device

    @abstractmethod
    def work(self) -> Work:
        """The useful work: the same for every implementation, whatever it does besides."""

    @abstractmethod
    def check(self, computes: str, outcome: Outcome) -> Check:
        """Compare what an implementation gave with float64, on a slice of the very operands that are timed."""


def worst(checks: Sequence[Check]) -> Check:
    """The check that is closest to failing, or that fails by most."""
    return max(
        checks, key=lambda check: float("inf") if check.error != check.error else check.error / check.allowed(OURS)
    )


def difference(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference relative to the largest value; NaN if there is a NaN."""
    largest = truth.abs().max().clamp(min=torch.finfo(truth.dtype).tiny)
    return float((found.to(truth.dtype) - truth).abs().max() / largest)
