"""Attention that reads some keys on a CPU, selector included, beside dense attention to all of them.

One layer of random weights attends, and its call is repeated: what is compared takes turns in one process, and the
processor's time of this thread alone is counted. Ratios to dense attention of the same run are reported, of medians
and, in brackets, of minima. Run it on an idle machine:

    python benchmarks/selection.py decode --keys 4096 --keys 16384
    python benchmarks/selection.py prefill --tokens 2048 --tokens 4096 --tokens 8192
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
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import patchattn
from patchattn.core.call import AttentionCall
from patchattn.core.kv_caches import cache_argument
from patchattn.reading.selection import SelectionVariant

HEADS, KV_HEADS, DIM = 16, 4, 64
Runs = dict[str, Callable[[], Any]]
Row = dict[str, str]
app = typer.Typer(add_completion=False)

Repeats = Annotated[int, typer.Option(help="Timed rounds; one more warms up.")]
Markdown = Annotated[Path | None, typer.Option(help="File for the table; printed in any case.")]


def in_turn(runs: Runs, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every round, after one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(repeats + 1):
        for name, run in runs.items():
            start = time.thread_time()
            run()
            if round_number:
                times[name].append((time.thread_time() - start) * 1e3)
    return times


def built(longest: int) -> LlamaForCausalLM:
    sizes = {"hidden_size": HEADS * DIM, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": DIM}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=longest)).eval()


def timed(
    variant: str, settings: dict[str, Any], lengths: list[int], dense: Callable[[AttentionCall], Runs], repeats: int
) -> tuple[dict[str, list[float]], float]:
    """Times of a variant's attention, whole, and of dense baselines in the last of a text's calls; and the density.

    Args:
        variant: its name.
        settings: of it.
        lengths: tokens of each call.
        dense: of that call, the baselines by name.
        repeats: how many rounds.
    """
    model, found, densities = built(sum(lengths)), {}, []
    patchattn.patch_model(model, variant, **settings)
    attend = SelectionVariant.attend

    def repeated(self: SelectionVariant, call: AttentionCall, inner: Any) -> Any:
        if call.mask.columns == sum(lengths):
            found.update(in_turn({**dense(call), variant: lambda: attend(self, call, inner)}, repeats))
        return attend(self, call, inner)

    def observed(observation: Any) -> None:
        densities.append(float(observation.values["density"].mean()))

    cache = DynamicCache(config=model.config)
    with torch.inference_mode(), mock.patch.object(SelectionVariant, "attend", repeated):
        for length in lengths:
            model(input_ids=torch.randint(64, (1, length)), **cache_argument(model, cache), logits_to_keep=1)
    with torch.inference_mode(), patchattn.observe(model, observed):  # a run of its own: to report takes time
        cache = DynamicCache(config=model.config)
        for length in lengths:
            model(input_ids=torch.randint(64, (1, length)), **cache_argument(model, cache), logits_to_keep=1)
    return found, densities[-1]


@app.command()
def decode(
    keys: Annotated[list[int], typer.Option(help="Keys in the cache.")] = [4096, 16384],  # noqa: B006
    share: Annotated[list[float], typer.Option(help="Share of the keys that is read.")] = [0.05, 0.1],  # noqa: B006
    page: Annotated[list[int], typer.Option(help="Keys of a page.")] = [16, 64],  # noqa: B006
    repeats: Repeats = 30,
    markdown: Markdown = None,
) -> None:
    """One token of Quest, with a choice of pages per kv head, beside dense attention as sdpa and with grouped rows."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for length in keys:
        for part in share:
            for size in page:
                settings = {"budget": int(part * length), "page": size, "dense_layers": 0}
                times, density = timed("quest", settings, [length - 1, 1], _dense_step, repeats)
                rows.append(row(f"quest, pages of {size}, {part:.0%}", length, density, times, "grouped rows"))
    save(rows, markdown)


def _dense_step(call: AttentionCall) -> Runs:
    grouped = call.query.reshape(1, KV_HEADS, -1, DIM)
    return {
        "sdpa": lambda: scaled_dot_product_attention(call.query, call.key, call.value, enable_gqa=True),
        "grouped rows": lambda: scaled_dot_product_attention(grouped, call.key, call.value),
    }


@app.command()
def prefill(
    tokens: Annotated[list[int], typer.Option(help="Lengths of prompts.")] = [2048, 4096, 8192],  # noqa: B006
    repeats: Repeats = 5,
    markdown: Markdown = None,
) -> None:
    """A prompt under `streaming` (64 sinks, 256 recent keys) and `triangle`, beside dense causal attention."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for length in tokens:
        for variant, settings in {
            "streaming": {"sinks": 64, "recent": 256},
            "triangle": {"dense_layers": 0},
        }.items():
            times, density = timed(variant, settings, [length], _dense_prompt, repeats)
            rows.append(row(variant, length, density, times, "sdpa"))
    save(rows, markdown)


def _dense_prompt(call: AttentionCall) -> Runs:
    operands = (call.query, call.key, call.value)
    return {"sdpa": lambda: scaled_dot_product_attention(*operands, is_causal=True, enable_gqa=True)}


def row(what: str, length: int, density: float, times: dict[str, list[float]], baseline: str) -> Row:
    """A line of the table: the last of the times is the selector's."""
    *others, own = times
    ratios = {}
    for name in others:
        medians, least = (f(times[own]) / f(times[name]) for f in (statistics.median, min))
        ratios[name] = f"{medians:.2f} ({least:.2f})"
    dense = f"{statistics.median(times[baseline]):.2f}"
    beside = ", ".join(f"{ratio} of {name}" for name, ratio in ratios.items())
    return {"What": what, "Keys": f"{length}", "Density": f"{density:.3f}", "Dense, ms": dense, "Ratio": beside}


def save(rows: list[Row], markdown: Path | None) -> None:
    """Print the table, and write it."""
    lines = ["| " + " | ".join(line) + " |" for line in [list(rows[0]), ["---"] * len(rows[0])]]
    lines += ["| " + " | ".join(one.values()) + " |" for one in rows]
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, patchattn {patchattn.__version__}"
    shape = f"batch 1, {HEADS} query heads, {KV_HEADS} kv heads of {DIM}, float32, one thread, seed 0"
    text = "\n".join([*lines, "", f"{date.today()}, {platform.machine()}, {versions}; {shape}.", ""])
    print(text)
    if markdown is not None:
        markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    app()
