"""Attention of variants on a CPU beside dense causal attention: the ratios, and what is wanted of each.

What is compared is verified against float64, then timed in turn in one process, on one thread; times are minima over
all rounds. Run it on an idle machine:

    python benchmarks/cpu_ratios.py --markdown docs/results/cpu_ratios.md
"""

import platform
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import patchattn
from patchattn.bench import act, block_sparse
from patchattn.bench.attention import dense, step
from patchattn.bench.cases import Case
from patchattn.bench.problem import OURS
from patchattn.bench.registry import PROBLEMS
from patchattn_kernels import apply_head_gate, routed_attention_if_faster

# Of each operation: what it is, which of its times is divided by dense attention's or divides it, and what is wanted
# at a length. Where routed attention declines it is dense attention with gates, which is not to gain anything.
ROWS = {
    "act": ("act, prefill: time over dense", {2048: "at most 2.0", 4096: "at most 2.0"}),
    "block_sparse": ("64 sinks and 256 recent keys: times faster than dense", {1024: "at least 0.98"}),
    "long_windows": ("64 sinks, recent keys to 3/4 of all: times faster than dense", {1024: "at least 0.98"}),
    "routed": (
        "MoH 50 %, causal: times faster than dense",
        {1024: "declines", 2048: "at least 1.25", 4096: "at least 1.5"},
    ),
}


def made(op: str, tokens: int) -> tuple[Any, Callable[[], Any], str, bool]:
    """The problem of a row on 12 heads of 64, ours, what it computes, and whether it declines."""
    name = "block_sparse" if op == "long_windows" else op
    case = Case(name, "gpt2", tokens, active=0.5, pattern="moh" if op == "routed" else "uniform", dtype="float32")
    problem: Any = PROBLEMS[name](case, torch.device("cpu"))
    if op == "long_windows":
        problem.operands = replace(problem.operands, window=(64, max(1, tokens * 3 // 4 - 64)))
    if op == "act":
        return problem, act.ours(problem), "act", False
    if name == "block_sparse":
        return problem, block_sparse.ours(problem), "streaming", False
    o = problem.operands

    def routed() -> torch.Tensor:
        output = routed_attention_if_faster(o.query, o.key, o.value, o.given_gate, o.rule)
        if output is not None:
            return output
        return apply_head_gate(dense(o).transpose(1, 2), o.given_gate).transpose(1, 2)

    declines = routed_attention_if_faster(o.query, o.key, o.value, o.given_gate, o.rule) is None
    return problem, step(o, routed), "gated", declines


def measured(op: str, tokens: int, rounds: int) -> list[str]:
    """One row of the table."""
    problem, run, computes, declines = made(op, tokens)
    check = problem.check(computes, run())
    if not check.passes(OURS):
        raise SystemExit(f"{op} at {tokens} tokens is off by {check.error:.2g}; {check.allowed(OURS):.2g} is allowed.")
    runs = [step(problem.operands, lambda: dense(problem.operands)), run]
    best = [float("inf")] * 2
    for number in range(rounds + 1):
        for place, function in enumerate(runs):
            start = time.perf_counter()
            function()
            elapsed = time.perf_counter() - start
            if number:  # the first round warms up
                best[place] = min(best[place], elapsed)
    title, wanted = ROWS[op]
    ratio = best[1] / best[0] if op == "act" else best[0] / best[1]
    times = [f"{seconds * 1e3:.1f}" for seconds in best]
    return [title, str(tokens), *times, f"**{ratio:.2f}**{' (declines)' if declines else ''}", wanted.get(tokens, "")]


def main(
    tokens: Annotated[list[int], typer.Option(help="Lengths.")] = [1024, 2048, 4096],  # noqa: B006
    op: Annotated[list[str], typer.Option(help="Operation: act, block_sparse, long_windows or routed.")] = list(ROWS),  # noqa: B006
    rounds: Annotated[int, typer.Option(help="Timed rounds.", min=1)] = 15,
    threads: Annotated[int, typer.Option(help="Threads of torch.", min=1)] = 1,
    markdown: Annotated[Path | None, typer.Option(help="File for the table; printed in any case.")] = None,
) -> None:
    """The table: attention of 12 heads of 64, float32, one sequence, forward."""
    torch.set_num_threads(threads)
    head = f"{date.today()}, {platform.machine()}, {threads} thread{'s' * (threads > 1)}, "
    head += f"Python {platform.python_version()}, torch {torch.__version__}, patchattn {patchattn.__version__}.\n"
    how = f"`python benchmarks/cpu_ratios.py`: minima of {rounds} rounds in turn, verified against float64 first."
    lines = ["# Attention on a CPU", "", head + how, ""]
    lines += ["12 heads of 64, float32, one sequence, forward; *dense* is causal SDPA without a mask.", ""]
    lines += ["| attention | tokens | dense ms | ours ms | ratio | wanted |", "|---" * 6 + "|"]
    for name in op:
        for length in tokens:
            lines.append(f"| {' | '.join(measured(name, length, rounds))} |")
            typer.echo(lines[-1])
    if markdown is not None:
        markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    typer.run(main)
