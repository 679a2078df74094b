"""Inverse temperatures of tokens (SSA): a product that torch.compile fuses, so a kernel would have to beat that."""

from collections.abc import Callable

import torch

from patchattn_kernels import scale_tokens

from .attention import compiled
from .cases import Case
from .operands import generator, make_operands
from .problem import OURS, Check, Implementation, Outcome, Problem, UnavailableError, Work, difference, worst

STREAMS = ("query", "key", "value")


def eager(problem: "TemperatureProblem") -> Callable[[], Outcome]:
    """One product after the other."""
    return lambda: problem.scaled(scale_tokens)


def fused(problem: "TemperatureProblem") -> Callable[[], Outcome]:
    """All three products under torch.compile, which may fuse them."""
    if problem.device.type != "cuda":
        raise UnavailableError("compared on GPUs only")
    together = compiled(problem.all_scaled)

    def run() -> Outcome:
        with torch.no_grad():
            return together()

    return run


class TemperatureProblem(Problem):
    """Queries, keys and values times a factor per token and head."""

    implementations = (
        Implementation("patchattn", eager, "scaled", kernel="temperature", leeway=OURS),
        Implementation("torch.compile", fused, "scaled"),
    )

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device)
        operands, source = make_operands(case, device), generator(case, device)
        self.states = {name: getattr(operands, name) for name in STREAMS}
        self.factors = {
            name: torch.rand(case.batch, t.shape[2], t.shape[1], device=device, generator=source) + 0.5
            for name, t in self.states.items()
        }

    def scaled(self, scale: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Outcome:
        with torch.no_grad():
            return {name: scale(self.states[name], self.factors[name]) for name in STREAMS}

    def all_scaled(self) -> Outcome:
        return {name: scale_tokens(self.states[name], self.factors[name]) for name in STREAMS}

    def work(self) -> Work:
        moved = sum(2 * t.nbytes for t in self.states.values()) + sum(t.nbytes for t in self.factors.values())
        return Work(float(sum(t.numel() for t in self.states.values())), float(moved))

    def check(self, computes: str, outcome: Outcome) -> Check:
        """Against float64; torch's own product rounds the factor to the operands' dtype first, as ours does."""
        checks = []
        for name in STREAMS:
            states, factor = self.states[name], self.factors[name].transpose(1, 2)[..., None]
            truth = states.double() * factor.double()
            own = states * factor.to(states.dtype)
            checks.append(Check(difference(outcome[name], truth), difference(own, truth), name))
        return worst(checks)
