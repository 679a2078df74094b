"""MoH on a CPU: attention, and whole models, whose dropped heads cost nothing, beside dense attention.

What is compared is timed in turn in one process; medians are reported. Rows are kept in a JSON file, so that a long
measurement can be done in portions, and the table of all of them is printed. Run it on an idle machine:

    python benchmarks/routed_cpu.py attention --tokens 1024 --tokens 2048
    python benchmarks/routed_cpu.py model --tokens 1024
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest import mock

import torch
import transformers
import typer
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import patchattn
from patchattn_kernels import AttentionRule, routed_attention_cpu

HEADS, DIM, LAYERS = 12, 64, 12
NO_LIMITS = {
    "SHORTEST": 1,
    "LARGEST_SHARE": 1.0,
    "CAUSAL_SHORTEST": 1,
    "CAUSAL_GAIN": float("inf"),
    "CAUSAL_SAVING": -1.0,
}
app = typer.Typer(add_completion=False)

Tokens = Annotated[list[int], typer.Option(help="Lengths.")]
Repeats = Annotated[int, typer.Option(help="Timed rounds; one more warms up.")]
Threads = Annotated[int, typer.Option(help="Threads of torch.")]
Rows = Annotated[Path, typer.Option(help="JSON file that rows are added to.")]
Markdown = Annotated[Path | None, typer.Option(help="File for the table; printed in any case.")]


def in_turn(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every round, after one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_number:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def gates(pattern: str, tokens: int, ratio: float) -> torch.Tensor:
    """`(1, T, H)` of 0 and 1. `moh`: two thirds of the active heads are shared, as by default; `uniform`: none is."""
    active = max(1, round(ratio * HEADS))
    shared = int(active * 2 / 3 + 0.5) if pattern == "moh" else 0
    scores = torch.rand(1, tokens, HEADS - shared)
    chosen = torch.zeros_like(scores).scatter(-1, scores.topk(active - shared, dim=-1).indices, 1.0)
    return torch.cat([torch.ones(1, tokens, shared), chosen], dim=-1)


@app.command()
def attention(
    tokens: Tokens = [1024, 2048, 4096],  # noqa: B006
    training: Annotated[bool, typer.Option(help="Forward and backward.")] = False,
    repeats: Repeats = 9,
    threads: Threads = 2,
    rows: Rows = Path("routed_cpu.json"),
    markdown: Markdown = None,
) -> None:
    """Attention of 12 heads of 64: dropped pairs left out, whether or not that is what is chosen, beside dense SDPA."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    found = []
    for length in tokens:
        for causal in (False, True):
            for pattern in ("moh", "uniform"):
                for ratio in (0.25, 0.5, 0.75, 1.0):
                    chosen, times = compare(length, causal, gates(pattern, length, ratio), training, repeats)
                    work = f"{'causal' if causal else 'bidirectional'}, {'training' if training else 'forward'}"
                    found.append(row("attention", work, length, f"{pattern} {ratio:.0%}", chosen, times))
    save(found, rows, threads, markdown)


def compare(
    length: int, causal: bool, gate: torch.Tensor, training: bool, repeats: int
) -> tuple[str, dict[str, list[float]]]:
    """What is chosen, and the times of both."""
    # keys lie as a projection leaves them, and outputs as a projection takes them
    operands = [tensor.transpose(1, 2).requires_grad_(training) for tensor in torch.randn(3, 1, length, HEADS, DIM)]
    upstream = torch.randn(1, length, HEADS, DIM)
    rule = AttentionRule(scaling=DIM**-0.5, causal=causal)

    def run(attend: Callable[[], torch.Tensor]) -> None:
        output = attend().transpose(1, 2).contiguous()
        if training:
            (output * upstream).sum().backward()

    def dense() -> torch.Tensor:
        return scaled_dot_product_attention(*operands, is_causal=causal)

    def routed() -> torch.Tensor:
        with mock.patch.multiple(routed_attention_cpu, **NO_LIMITS):
            output = routed_attention_cpu.routed_on_cpu(*operands, gate, rule)
        assert output is not None
        return output

    with torch.set_grad_enabled(training):
        chosen = "dense" if routed_attention_cpu.routed_on_cpu(*operands, gate, rule) is None else "routed"
        return chosen, in_turn({"dense": lambda: run(dense), "routed": lambda: run(routed)}, repeats)


@app.command()
def model(
    tokens: Tokens = [1024, 2048, 4096],  # noqa: B006
    kind: Annotated[Literal["bert", "llama"], typer.Option(help="Encoder or decoder, of BERT-base's size.")] = "bert",
    ratio: Annotated[list[float], typer.Option(help="Active ratios.")] = [0.5, 0.75],  # noqa: B006
    repeats: Repeats = 5,
    threads: Threads = 2,
    rows: Rows = Path("routed_cpu.json"),
    markdown: Markdown = None,
) -> None:
    """Forward of a model with random weights: unpatched, MoH with all heads and gates, and MoH as it chooses."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    found = []
    built = build(kind, max(tokens))
    for length in tokens:
        for share in ratio:
            times = compare_models(built, length, share, repeats)
            found.append(row("model", type(built).__name__, length, f"MoH {share:.0%}", "", times))
    save(found, rows, threads, markdown)


def compare_models(built: nn.Module, length: int, share: float, repeats: int) -> dict[str, list[float]]:
    given = torch.randint(1000, 2000, (1, length))

    def run(backend: str) -> None:
        with mock.patch.dict("os.environ", {"PATCHATTN_KERNELS": backend}):
            built(input_ids=given, use_cache=False)

    def unpatched() -> None:
        with patchattn.unpatched(built):
            run("auto")

    runs = {"dense": unpatched, "all heads": lambda: run("reference"), "routed": lambda: run("auto")}
    with patchattn.patched(built, "moh", active_ratio=share), torch.inference_mode():
        return in_turn(runs, repeats)


def build(kind: str, length: int) -> nn.Module:
    """A model of BERT-base's size, on sdpa, with random weights."""
    sizes = {"hidden_size": HEADS * DIM, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    sizes |= {"intermediate_size": 3072 if kind == "bert" else 2048, "vocab_size": 30522}
    names = {"bert": ("BertConfig", "BertModel"), "llama": ("LlamaConfig", "LlamaModel")}[kind]
    config = getattr(transformers, names[0])(**sizes, max_position_embeddings=length, attn_implementation="sdpa")
    return getattr(transformers, names[1])(config).eval()


def row(part: str, work: str, tokens: int, case: str, chosen: str, times: dict[str, list[float]]) -> dict[str, Any]:
    """One line of the table: medians, and the median and quartiles of the ratios of dense to routed."""
    ratios = [dense / routed for dense, routed in zip(times["dense"], times["routed"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    medians = {f"{name} ms": statistics.median(values) for name, values in times.items()}
    shown = {"part": part, "work": work, "tokens": tokens, "case": case, "chosen": chosen}
    return {**shown, **medians, "speed-up": middle, "low": low, "high": high, "rounds": len(ratios)}


def save(found: list[dict[str, Any]], path: Path, threads: int, markdown: Path | None) -> None:
    """Add rows to the file, in place of those of the same case, and print the tables of all."""
    content = json.loads(path.read_text()) if path.exists() else {"rows": []}
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, patchattn {patchattn.__version__}"
    content["machine"] = f"{date.today()}, {platform.machine()}, {threads} threads, Python "
    content["machine"] += f"{platform.python_version()}, {versions}"

    def key(entry: dict[str, Any]) -> tuple[Any, ...]:
        return entry["part"], entry["work"], entry["tokens"], entry["case"]

    kept = {key(entry): entry for entry in [*content["rows"], *found]}
    content["rows"] = list(kept.values())
    path.write_text(json.dumps(content, indent=1) + "\n")
    text = tables(content)
    typer.echo(text)
    if markdown is not None:
        markdown.write_text(text)


def tables(content: dict[str, Any]) -> str:
    lines = [content["machine"] + ".", ""]
    lines += ["| attention | tokens | gates | dense ms | routed ms | speed-up | chosen |", "|---" * 7 + "|"]
    for entry in content["rows"]:
        if entry["part"] == "attention":
            lines.append(
                f"| {entry['work']} | {entry['tokens']} | {entry['case']} | {entry['dense ms']:.1f} | "
                f"{entry['routed ms']:.1f} | {speed_up(entry)} | {entry['chosen']} |"
            )
    lines += ["", "| model | tokens | variant | unpatched tokens/s | all heads and gates | as chosen | speed-up |"]
    lines += ["|---" * 7 + "|"]
    for entry in content["rows"]:
        if entry["part"] == "model":
            rates = [entry["tokens"] / entry[f"{name} ms"] * 1e3 for name in ("dense", "all heads", "routed")]
            spelled = " | ".join(f"{rate:.0f}" for rate in rates)
            lines.append(f"| {entry['work']} | {entry['tokens']} | {entry['case']} | {spelled} | {speed_up(entry)} |")
    return "\n".join(lines) + "\n"


def speed_up(entry: dict[str, Any]) -> str:
    return f"**{entry['speed-up']:.2f}** ({entry['low']:.2f} to {entry['high']:.2f})"


if __name__ == "__main__":
    app()
