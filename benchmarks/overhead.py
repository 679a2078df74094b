"""What patching costs where it changes nothing: time of a patched forward over that of the same model unpatched.

Both are timed in turn in one process, and the median of the ratios is reported, so that a slower machine or a busy one
changes both alike. Run it on an idle machine:

    python benchmarks/overhead.py --encoder DIR --decoder DIR --output docs/results/overhead.md
"""

import datetime
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

import patchattn
from patchattn.core.kv_caches import cache_argument

# A neutral patch is dispatched through the seam and computes nothing of its own. The others show what their
# computation costs on these small models, in plain torch.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("moh", {"active_ratio": 1.0}),
    ("moh", {}),
    ("moh", {"router": "learned"}),
    ("ssa", {}),
]
BATCH, LENGTH = 32, 128
PROMPT, TOKENS = 8, 64


def encode(model: nn.Module) -> Callable[[], None]:
    """One forward of an encoder on 32 x 128 tokens."""
    tokens = torch.randint(1000, 2000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))

    def run() -> None:
        model(input_ids=tokens)

    return run


def decode(model: nn.Module) -> Callable[[], None]:
    """64 greedy steps of a decoder, batch 1, dynamic cache."""
    prompt = torch.randint(3, 500, (1, PROMPT), generator=torch.Generator().manual_seed(0))

    def run() -> None:
        cache, tokens = DynamicCache(config=model.config), prompt
        for _ in range(TOKENS):
            tokens = model(tokens, **cache_argument(model, cache)).logits[:, -1:].argmax(-1)

    return run


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratios(
    model: nn.Module, run: Callable[[], None], variant: str, settings: dict[str, Any], pairs: int
) -> dict[str, float]:
    """Median ratio of patched to unpatched, its quartiles, and the median times in milliseconds."""
    found, patched_times, base_times = [], [], []
    patchattn.patch_model(model, variant, settings)
    with torch.inference_mode():
        for pair in range(pairs + 1):
            order = (True, False) if pair % 2 else (False, True)
            times = {}
            for is_patched in order:
                if is_patched:
                    times[True] = seconds(run)
                else:
                    with patchattn.unpatched(model):
                        times[False] = seconds(run)
            if pair:  # the first is a warm-up
                found.append(times[True] / times[False])
                patched_times.append(times[True] * 1e3)
                base_times.append(times[False] * 1e3)
    patchattn.unpatch_model(model)
    low, _, high = statistics.quantiles(found, n=4)
    return {
        "ratio": statistics.median(found),
        "low": low,
        "high": high,
        "patched": statistics.median(patched_times),
        "base": statistics.median(base_times),
    }


def import_seconds(statement: str, repeats: int = 7) -> float:
    """Median wall time of a fresh interpreter that runs one statement."""
    command = [sys.executable, "-c", statement]
    return statistics.median(seconds(lambda: subprocess.run(command, check=True)) for _ in range(repeats))


def described(model: nn.Module) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    return f"{type(model).__name__}, {parameters / 1e6:.2f} M parameters"


def graph_breaks(model: nn.Module, inputs: dict[str, torch.Tensor], variant: str, settings: dict[str, Any]) -> int:
    torch._dynamo.reset()
    with patchattn.patched(model, variant, settings), torch.inference_mode():
        return int(torch._dynamo.explain(model)(**inputs).graph_break_count)


def main(
    encoder: Annotated[Path, typer.Option(help="Folder of an encoder, such as MiniLM.")],
    decoder: Annotated[Path, typer.Option(help="Folder of a causal language model, such as stories260K.")],
    output: Annotated[Path | None, typer.Option(help="Markdown file to write.")] = None,
    pairs: Annotated[int, typer.Option(help="Timed pairs per row.")] = 30,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
) -> None:
    """Measure and print the table."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    first, second = AutoModel.from_pretrained(encoder).eval(), AutoModelForCausalLM.from_pretrained(decoder).eval()
    models = {
        f"{described(first)}, forward {BATCH} x {LENGTH} tokens": (first, encode),
        f"{described(second)}, {TOKENS} decoding steps": (second, decode),
    }
    lines = [
        "# Overhead of a patch",
        "",
        f"{datetime.date.today()}, {platform.machine()}, {threads} threads, Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, patchattn {patchattn.__version__}.",
        "",
        f"`python benchmarks/{Path(__file__).name} --pairs {pairs}`: patched and unpatched timed in turn, "
        f"{pairs} pairs; median of the ratios, quartiles in brackets.",
        "",
        "| model and work | variant | settings | unpatched ms | patched ms | ratio | graph breaks |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (model, work) in models.items():
        tokens = torch.randint(3, 500, (2, 16))
        for variant, settings in CASES:
            row = ratios(model, work(model), variant, settings, pairs)
            breaks = graph_breaks(model, {"input_ids": tokens}, variant, settings)
            spelled = ", ".join(f"{key}={value}" for key, value in settings.items()) or "default"
            lines.append(
                f"| {name} | {variant} | {spelled} | {row['base']:.2f} | {row['patched']:.2f} | "
                f"**{row['ratio']:.3f}** ({row['low']:.3f} to {row['high']:.3f}) | {breaks} |"
            )
            typer.echo(lines[-1])
    lines.append("")
    for statement, more in (
        ("import transformers", "import patchattn"),
        ("import transformers.modeling_utils", "from patchattn import patch_model"),
    ):
        alone, both = import_seconds(statement), import_seconds(f"{statement}; {more}")
        lines.append(f"- `{statement}`: {alone:.2f} s; then `{more}`: {both - alone:+.2f} s.")
    if output is not None:
        output.write_text("\n".join(lines) + "\n")
    typer.echo("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
