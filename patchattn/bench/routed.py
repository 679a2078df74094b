"""Routed attention (MoH): ours beside dense attention and the gate applied afterwards."""

from collections.abc import Callable
from functools import partial

import torch

from patchattn_kernels import apply_head_gate, routed_attention

from .attention import DENSE, FLEX, AttentionProblem, dense, dense_under, flex, step
from .installed import INSTALLED
from .problem import OURS, Implementation, Outcome, UnavailableError, Work


def ours(problem: "RoutedProblem") -> Callable[[], Outcome]:
    """The operation; its lists of selected pairs are made anew in every call."""
    o = problem.operands
    return step(o, lambda: routed_attention(o.query, o.key, o.value, o.given_gate, o.rule), gated=True)


def afterwards(problem: "RoutedProblem") -> Callable[[], Outcome]:
    """As the released MoH code does it: all heads are computed, and their outputs multiplied by the gate."""
    o = problem.operands
    return step(o, lambda: apply_head_gate(dense(o).transpose(1, 2), o.given_gate).transpose(1, 2), gated=True)


def masked_flex(problem: "RoutedProblem", backend: str = "") -> Callable[[], Outcome]:
    """FlexAttention that sees no key for a pair that is not selected; the gate afterwards."""
    o = problem.operands
    if o.trains:
        raise UnavailableError("not compared in training")
    gate, causal = o.given_gate.detach(), o.rule.causal
    selected = gate != 0

    offset = o.key.shape[2] - o.query.shape[2]

    def visible(b: torch.Tensor, h: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen = selected[b, row, h]
        return seen & (key <= row + offset) if causal else seen & (key >= 0)

    attend = flex(o, visible, batch=o.query.shape[0], heads=o.query.shape[1], backend=backend)
    return step(o, lambda: apply_head_gate(attend().transpose(1, 2), gate).transpose(1, 2))


class RoutedProblem(AttentionProblem):
    """Attention of the (token, query head) pairs that a gate keeps."""

    implementations = (
        Implementation("patchattn", ours, "gated", kernel="routed_attention", leeway=OURS),
        *map(dense_under, DENSE),
        Implementation("mask afterwards", afterwards, "gated"),
        *(Implementation(name, partial(masked_flex, backend=backend), "gated") for name, backend in FLEX.items()),
        *INSTALLED,
    )

    def work(self) -> Work:
        o = self.operands
        selected = o.given_gate.detach() != 0  # (B, Tq, H)
        pairs = float((selected.sum(dim=(0, 2)) * o.visible_counts("dense")).sum())
        rows, dim, size = float(selected.sum()), o.query.shape[-1], o.query.element_size()
        # a kv head that no selected query head of any row shares is not read
        groups = selected.unflatten(2, (o.key.shape[1], -1)).any(dim=3).any(dim=1).sum()
        read = (rows + 2.0 * float(groups) * o.key.shape[2]) * dim * size + o.given_gate.nbytes
        written = float(o.query.numel()) * size
        if o.trains:  # read once more with the output's gradient, and as many gradients written
            read, written = 2.0 * read + rows * dim * size, written + read
        return Work(4.0 * pairs * dim * self.passes, read + written)
