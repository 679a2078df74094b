"""What a sink, a gate and forgetting cost on a CPU: attention alone, forward and training step, over plain SDPA.

One layer of SmolLM2-135M's sizes and random weights runs, and its call is repeated with and without the variant, in
turn, on one thread; the processor's time of that thread is counted. Decoding is in `overhead.py`. Run it on an idle
machine:

    python benchmarks/added_cost.py --output docs/results/added_cost.md
"""

import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import transformers
import typer
from transformers import LlamaConfig, LlamaForCausalLM

import patchattn
from patchattn.core.call import AttentionCall

VARIANTS, LENGTHS, GOAL = ("sink", "gated", "fox"), (1024, 4096), 1.2
SIZES = {"hidden_size": 576, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}


def in_turn(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every round, after one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.thread_time()
            run()
            if number:
                times[name].append(1e3 * (time.thread_time() - start))
    return times


def step(attend: Callable[[AttentionCall], Any], call: AttentionCall) -> None:
    """Forward and backward of the output's sum, to queries, keys, values and what the variant adds."""
    states = {name: getattr(call, name).detach().requires_grad_() for name in ("query", "key", "value")}
    attend(call.replace(**states))[0].sum().backward()


def measured(name: str, length: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Times of a variant and of plain attention, forward and training step."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, max_position_embeddings=length)).eval().requires_grad_(False)
    patchattn.patch_model(model, name)
    variant: Any = patchattn.variant_info(name).variant
    attend, found = variant.attend, {}

    def repeated(self: Any, call: AttentionCall, inner: Any) -> Any:
        with torch.no_grad():
            runs = {"plain": lambda: inner(call), name: lambda: attend(self, call, inner)}
            found["forward"] = in_turn(runs, rounds)
        with torch.enable_grad():
            steps = {"plain": lambda: step(inner, call), name: lambda: step(lambda c: attend(self, c, inner), call)}
            found["training step"] = in_turn(steps, rounds)
        return attend(self, call, inner)

    with mock.patch.object(variant, "attend", repeated):
        model(input_ids=torch.randint(64, (1, length)), use_cache=False, logits_to_keep=1)
    return found


def main(
    rounds: Annotated[int, typer.Option(help="Timed rounds; one more warms up.", min=2)] = 15,
    output: Annotated[Path | None, typer.Option(help="Markdown file to write; printed in any case.")] = None,
) -> None:
    """Measure and print the table."""
    torch.set_num_threads(1)
    lines = [
        "# What a sink, a gate and forgetting cost on a CPU",
        "",
        f"{date.today()}, {platform.machine()}, one thread, Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, patchattn {patchattn.__version__}. "
        "`python benchmarks/added_cost.py`: attention alone, 9 query and 3 kv heads of 64, float32, one sequence, "
        f"causal, medians of {rounds} rounds in turn and, in brackets, minima. Wanted is at most {GOAL} of plain SDPA.",
        "",
        "| variant | tokens | | plain, ms | patched, ms | ratio |  |",
        "|---|---:|---|---:|---:|---:|---|",
    ]
    for name in VARIANTS:
        for length in LENGTHS:
            for what, times in measured(name, length, rounds).items():
                plain, own = (statistics.median(times[each]) for each in ("plain", name))
                ratio, least = own / plain, min(times[name]) / min(times["plain"])
                said = "met" if ratio <= GOAL else "**missed**"
                row = [f"`{name}`", str(length), what, f"{plain:.1f}", f"{own:.1f}", f"{ratio:.2f} ({least:.2f})", said]
                lines.append(f"| {' | '.join(row)} |")
                typer.echo(lines[-1])
    if output is not None:
        output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
