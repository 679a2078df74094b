"""What patching costs where it changes nothing: time of a patched forward over that of the same model unpatched.

Both are timed in turn in one process, and the median of the ratios is reported, so that a slower machine or a busy one
changes both alike; with one thread its processor's time is counted. Run it on an idle machine:

    python benchmarks/overhead.py --encoder DIR --decoder DIR --threads 1 --output docs/results/overhead.md
    python benchmarks/overhead.py --decoder DIR --prompt 1024 --pairs 10  # decoding behind a long prompt
    python benchmarks/overhead.py --encoder DIR --compile  # compiled patched over compiled unpatched

Further runs add their tables to the same page by `--append`.
"""

import copy
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
# What a ratio is to be at most: of an encoder, compiled, of a small decoder by case, and behind a long prompt.
ENCODER_GOAL = COMPILED_GOAL = 1.03
SHORT_GOALS = (1.01, 1.15, 1.25, 1.25, 1.12, 1.5, None, None, None)
LONG_GOALS = (1.05, 1.05, 1.05, 1.05, 1.05, 1.15, 1.05, 1.05, 1.05)
BATCH, LENGTH = 32, 128
Case = tuple[str, dict[str, Any], float | None]


def encode(model: nn.Module) -> Callable[[], float]:
    """Seconds of one forward of an encoder on 32 x 128 tokens."""
    tokens = torch.randint(1000, 2000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    return lambda: seconds(lambda: model(input_ids=tokens))


def decode(model: nn.Module, prompt: int, count: int) -> Callable[[], float]:
    """Seconds of greedy steps of a decoder behind a prompt, which is not timed; batch 1, dynamic cache."""
    tokens = torch.randint(3, 500, (1, prompt), generator=torch.Generator().manual_seed(0))
    filled: list[tuple[DynamicCache, torch.Tensor]] = []

    def step(token: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        found: torch.Tensor = model(token, **cache_argument(model, cache), logits_to_keep=1).logits.argmax(-1)
        return found

    def run() -> float:
        if not filled:
            empty = DynamicCache(config=model.config)
            filled.append((empty, step(tokens, empty)))
        cache, token = copy.deepcopy(filled[0])

        def steps(token: torch.Tensor) -> None:
            for _ in range(count):
                token = step(token, cache)

        return seconds(lambda: steps(token))

    return run


def seconds(run: Callable[[], Any]) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return clock() - start


def wall_seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratios(
    model: nn.Module,
    work: Callable[[nn.Module], Callable[[], float]],
    variant: str,
    settings: dict[str, Any],
    pairs: int,
    compiles: bool,
) -> dict[str, float]:
    """Median ratio of patched to unpatched, its quartiles, and the median times in milliseconds."""
    found, patched_times, base_times = [], [], []
    # Two copies of weights differ in speed by themselves; compiled code is of one state alone.
    models = {True: model, False: copy.deepcopy(model) if compiles else model}
    patchattn.patch_model(model, variant, settings)
    torch._dynamo.reset()
    runs = {is_patched: work(torch.compile(m) if compiles else m) for is_patched, m in models.items()}

    def timed(is_patched: bool) -> float:
        if is_patched or compiles:
            return runs[is_patched]()
        with patchattn.unpatched(model):
            return runs[False]()

    with torch.inference_mode():
        for pair in range(pairs + 1):
            order = (True, False) if pair % 2 else (False, True)
            times = {is_patched: timed(is_patched) for is_patched in order}
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
    return statistics.median(wall_seconds(lambda: subprocess.run(command, check=True)) for _ in range(repeats))


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
    compiles: Annotated[bool, typer.Option("--compile", help="Compile both; of the encoder alone.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Variants to run; all by default.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of the decoder.")] = 64,
    output: Annotated[Path | None, typer.Option(help="Markdown file to write.")] = None,
    append: Annotated[bool, typer.Option(help="Add to that file.")] = False,
    pairs: Annotated[int, typer.Option(help="Timed pairs per row.")] = 30,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
) -> None:
    """Measure and print the table."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    rows: list[tuple[str, nn.Module, Callable[[nn.Module], Callable[[], float]], list[Case]]] = []
    if encoder is not None:
        model = AutoModel.from_pretrained(encoder).eval()
        goal = COMPILED_GOAL if compiles else ENCODER_GOAL
        about = f"{described(model)}, forward {BATCH} x {LENGTH} tokens{', compiled' if compiles else ''}"
        rows.append((about, model, encode, [(*case, goal) for case in CASES]))
    if decoder is not None and not compiles:
        model = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32).eval()
        about = f"{described(model)}, {steps} decoding steps behind {prompt} tokens"
        goals = LONG_GOALS if prompt >= 1024 else SHORT_GOALS
        cases = [(*case, goal) for case, goal in zip(DECODING, goals, strict=True)]
        rows.append((about, model, lambda m: decode(m, prompt, steps), cases))
    if not rows:
        raise typer.BadParameter("Give --encoder, --decoder or both; --compile takes an encoder.")
    lines = [
        "" if append else "# Overhead of a patch\n",
        f"{datetime.date.today()}, {platform.machine()}, {threads} threads, Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, patchattn {patchattn.__version__}.",
        "",
        f"`python benchmarks/{Path(__file__).name} --prompt {prompt} --steps {steps} --pairs {pairs} "
        f"--threads {threads}{' --compile' if compiles else ''}`: patched and unpatched timed "
        f"in turn, {pairs} pairs; median of the ratios, quartiles in brackets, and the goal.",
        "",
        "| model and work | variant | settings | unpatched ms | patched ms | ratio | goal | graph breaks |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, model, work, cases in rows:
        tokens = torch.randint(3, 500, (2, 16))
        for variant, settings, goal in cases:
            if only and variant not in only:
                continue
            row = ratios(model, work, variant, settings, pairs, compiles)
            breaks = graph_breaks(model, {"input_ids": tokens}, variant, settings)
            spelled = ", ".join(f"{key}={value}" for key, value in settings.items()) or "default"
            said = "" if goal is None else f"{goal}, {'met' if row['ratio'] <= goal else '**missed**'}"
            lines.append(
                f"| {name} | {variant} | {spelled} | {row['base']:.2f} | {row['patched']:.2f} | "
                f"**{row['ratio']:.3f}** ({row['low']:.3f} to {row['high']:.3f}) | {said} | {breaks} |"
            )
            typer.echo(lines[-1])
    lines.append("")
    imports = (
        ("import transformers", "import patchattn"),
        ("import transformers.modeling_utils", "from patchattn import patch_model"),
    )
    for statement, more in () if append else imports:
        alone, both = import_seconds(statement), import_seconds(f"{statement}; {more}")
        lines.append(f"- `{statement}`: {alone:.2f} s; then `{more}`: {both - alone:+.2f} s.")
    if output is not None:
        with output.open("a" if append else "w", encoding="utf-8") as page:
            page.write("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    typer.run(main)
