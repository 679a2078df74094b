"""What patching costs where it changes nothing: time of a patched forward over that of the same model unpatched.

Both are timed in turn in one process, and the median of the ratios is reported, so that a slower machine or a busy one
changes both alike. Run it on an idle machine:

    python benchmarks/overhead.py --encoder DIR --decoder DIR --output docs/results/overhead.md
    python benchmarks/overhead.py --decoder DIR --prompt 1024 --pairs 10  # decoding behind a long prompt
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
DECODING = [*CASES, ("ssmax", {}), ("act", {}), ("sink", {}), ("gated", {}), ("fox", {})]
BATCH, LENGTH = 32, 128
TOKENS = 64


def encode(model: nn.Module) -> Callable[[], float]:
    """Seconds of one forward of an encoder on 32 x 128 tokens."""
    tokens = torch.randint(1000, 2000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    return lambda: seconds(lambda: model(input_ids=tokens))


def decode(model: nn.Module, prompt: int) -> Callable[[], float]:
    """Seconds of 64 greedy steps of a decoder behind a prompt, which is not timed; batch 1, dynamic cache."""
    tokens = torch.randint(3, 500, (1, prompt), generator=torch.Generator().manual_seed(0))

    def run() -> float:
        cache = DynamicCache(config=model.config)

        def step(token: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = model(token, **cache_argument(model, cache), logits_to_keep=1).logits.argmax(-1)
            return found

        def steps(token: torch.Tensor) -> None:
            for _ in range(TOKENS):
                token = step(token)

        first = step(tokens)
        return seconds(lambda: steps(first))

    return run


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratios(
    model: nn.Module, run: Callable[[], float], variant: str, settings: dict[str, Any], pairs: int
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
                    times[True] = run()
                else:
                    with patchattn.unpatched(model):
                        times[False] = run()
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
    encoder: Annotated[Path | None, typer.Option(help="Folder of an encoder, such as MiniLM.")] = None,
    decoder: Annotated[Path | None, typer.Option(help="Folder of a causal language model: stories260K.")] = None,
    prompt: Annotated[int, typer.Option(help="Tokens in front of the steps of the decoder.")] = 8,
    output: Annotated[Path | None, typer.Option(help="Markdown file to write.")] = None,
    pairs: Annotated[int, typer.Option(help="Timed pairs per row.")] = 30,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
) -> None:
    """Measure and print the table."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    rows: list[tuple[str, nn.Module, Callable[[], float], list[tuple[str, dict[str, Any]]]]] = []
    if encoder is not None:
        model = AutoModel.from_pretrained(encoder).eval()
        rows.append((f"{described(model)}, forward {BATCH} x {LENGTH} tokens", model, encode(model), CASES))
    if decoder is not None:
        model = AutoModelForCausalLM.from_pretrained(decoder).eval()
        about = f"{described(model)}, {TOKENS} decoding steps behind {prompt} tokens"
        rows.append((about, model, decode(model, prompt), DECODING))
    if not rows:
        raise typer.BadParameter("Give --encoder, --decoder or both.")
    lines = [
        "# Overhead of a patch",
        "",
        f"{datetime.date.today()}, {platform.machine()}, {threads} threads, Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, patchattn {patchattn.__version__}.",
        "",
        f"`python benchmarks/{Path(__file__).name} --prompt {prompt} --pairs {pairs}`: patched and unpatched timed in "
        f"turn, {pairs} pairs; median of the ratios, quartiles in brackets.",
        "",
        "| model and work | variant | settings | unpatched ms | patched ms | ratio | graph breaks |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, model, work, cases in rows:
        tokens = torch.randint(3, 500, (2, 16))
        for variant, settings in cases:
            row = ratios(model, work, variant, settings, pairs)
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
