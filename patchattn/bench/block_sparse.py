"""Block-sparse attention: heads that see the first keys and recent ones, beside dense attention and FlexAttention."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from patchattn_kernels import block_sparse_attention, sink_and_recent

from .attention import DENSE, FLEX, AttentionProblem, dense, dense_under, flex, step
from .installed import INSTALLED
from .problem import OURS, Implementation, Outcome, UnavailableError, Work

MOST_MASK = 2**31  # entries of an explicit mask


def ours(problem: "BlockSparseProblem") -> Callable[[], Outcome]:
    """The operation; the sizes of the windows are on the device beforehand."""
    o = problem.operands
    window = sink_and_recent(*o.window, heads=o.query.shape[1], device=o.query.device)
    return step(o, lambda: block_sparse_attention(o.query, o.key, o.value, window, o.rule))


def masked(problem: "BlockSparseProblem") -> Callable[[], Outcome]:
    """SDPA with the mask spelt out, made beforehand; whichever backend takes it."""
    o = problem.operands
    rows, keys = o.query.shape[2], o.key.shape[2]
    if rows * keys > MOST_MASK:
        raise UnavailableError(f"a mask of {rows} x {keys}")
    mask = o.visible("streaming", torch.arange(rows, device=o.query.device))
    return step(o, lambda: dense(o, repeat=True, mask=mask))


def window_alone(problem: "BlockSparseProblem") -> Callable[[], Outcome]:
    """SDPA over a cache that holds exactly the keys that are seen; in decoding, the rival that a user would build."""
    o = problem.operands
    if o.query.shape[2] != 1:
        raise UnavailableError("compared in decoding only")
    kept = o.visible("streaming", torch.zeros(1, dtype=torch.long, device=o.query.device))[0]
    window = replace(o, key=o.key[:, :, kept].contiguous(), value=o.value[:, :, kept].contiguous())
    return step(o, lambda: dense(window))


def masked_flex(problem: "BlockSparseProblem", backend: str = "") -> Callable[[], Outcome]:
    """FlexAttention, its block mask made beforehand."""
    o = problem.operands
    sinks, recent = o.window

    offset = o.key.shape[2] - o.query.shape[2]

    def visible(b: torch.Tensor, h: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        own = row + offset
        return (key <= own) & ((key < sinks) | (own - key < recent))

    return step(o, flex(o, visible, batch=None, heads=None, backend=backend))


class BlockSparseProblem(AttentionProblem):
    """Causal attention of heads that see `operands.window[0]` first keys and `operands.window[1]` recent ones."""

    implementations = (
        Implementation("patchattn", ours, "streaming", kernel="block_sparse_attention", leeway=OURS),
        *map(dense_under, DENSE),
        Implementation("SDPA with a mask", masked, "streaming"),
        Implementation("SDPA over the window", window_alone, "streaming"),
        *(Implementation(name, partial(masked_flex, backend=backend), "streaming") for name, backend in FLEX.items()),
        *INSTALLED,
    )

    def work(self) -> Work:
        o = self.operands
        pairs = float(o.visible_counts("streaming").sum()) * o.query.shape[0] * o.query.shape[1]
        read = min(sum(o.window), o.key.shape[2]) if o.query.shape[2] == 1 else o.key.shape[2]
        kept = 2.0 * o.key.shape[0] * o.key.shape[1] * read * o.key.shape[3] * o.key.element_size()
        moved = (2.0 * o.query.nbytes + kept) * (1.0 if not o.trains else 2.5)
        return Work(4.0 * pairs * o.query.shape[-1] * self.passes, moved)
