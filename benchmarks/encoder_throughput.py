"""Throughput of an encoder of BERT-base's shape with fewer heads, and under SHRP; FLOPs and parameters.

Weights are random: the time does not depend on them. The forms of the model take turns in one process, and ratios to
the dense model are taken within a turn, so that a busy machine changes all alike.

    python benchmarks/encoder_throughput.py --output docs/results/encoder_throughput.md
"""

import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers as tf
import typer
from torch.utils.flop_counter import FlopCounterMode

import patchattn

FORMS: dict[str, Callable[[Any], Any]] = {
    "dense": lambda model: model,
    "29 % of heads pruned": lambda model: patchattn.patch_model(model, "prune", heads=every_layer(4, 3)),
    "50 % of heads pruned": lambda model: patchattn.patch_model(model, "prune", heads=every_layer(6, 6)),
    "SHRP, one head per layer": lambda model: patchattn.patch_model(model, "shrp", kept=[0]),
    "one dense, one SHRP layer": lambda model: patchattn.patch_model(
        model, "shrp", kept=[0], layers=1, layers_dropped=range(2, 12)
    ),
}


def every_layer(even: int, odd: int) -> dict[int, list[int]]:
    """Heads to take out: so many of layers 0, 2, ... and of layers 1, 3, ...; 4 and 3 are 42 of 144, 29 %."""
    return {layer: list(range(odd if layer % 2 else even)) for layer in range(12)}


def bert_base() -> Any:
    """BERT-base without a head, with random weights."""
    torch.manual_seed(0)
    return tf.BertModel(tf.BertConfig()).eval()


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1000, 30000, (batch, length), generator=torch.Generator().manual_seed(batch))


def flops(model: Any, length: int) -> int:
    """Of one sequence, as torch counts matrix products and attention."""
    counter = FlopCounterMode(display=False)
    with counter, torch.inference_mode():
        model(tokens(1, length))
    return counter.get_total_flops()


def seconds(model: Any, batch: int, length: int) -> float:
    """Per forward."""
    inputs = tokens(batch, length)
    with torch.inference_mode():
        start = time.perf_counter()
        model(inputs)
    return time.perf_counter() - start


def main(
    output: Annotated[Path, typer.Option(help="Markdown file to write; the same name with .json gets all figures.")],
    turns: Annotated[int, typer.Option(help="How often every form is timed.")] = 7,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 128,
) -> None:
    """Measure and write the table."""
    models = {name: make(bert_base()) for name, make in FORMS.items()}
    facts = {
        name: {"parameters": sum(p.numel() for p in model.parameters()), "flops": flops(model, length)}
        for name, model in models.items()
    }
    times: dict[int, dict[str, list[float]]] = {}
    for batch in (1, 8, 32):
        times[batch] = {name: [] for name in models}
        for turn in range(turns + 1):
            for name, model in models.items():
                taken = seconds(model, batch, length)
                if turn:  # the first warms up
                    times[batch][name].append(taken)
    facts_lines = [
        f"| {name} | {fact['parameters'] / 1e6:.2f} M | {fact['flops'] / 1e9:.2f} G "
        f"({fact['flops'] / facts['dense']['flops']:.1%}) | "
        + " | ".join(cell(times[batch], name, batch) for batch in times)
        + " |"
        for name, fact in facts.items()
    ]
    lines = [
        "# Throughput of BERT-base with fewer heads",
        "",
        f"{datetime.date.today()}, {platform.machine()} CPU, {torch.get_num_threads()} thread(s), Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {tf.__version__}, patchattn "
        f"{patchattn.__version__}.",
        "",
        f"`python benchmarks/encoder_throughput.py --turns {turns} --length {length}`: BERT-base's shape (12 layers of "
        f"12 heads, 768 wide, FFN of 3072) with random weights, float32, SDPA, sequences of {length} tokens without "
        "padding, without a task's head. The forms take turns in one process: sequences per second are medians, and in "
        "bold the median ratio to the dense model within a turn. FLOPs are those of one sequence by torch's counter.",
        "",
        "| form | parameters | FLOPs | batch 1 | batch 8 | batch 32 |",
        "|---|---|---|---|---|---|",
        *facts_lines,
        "",
    ]
    output.write_text("\n".join(lines), encoding="utf-8")
    content = {"facts": facts, "seconds": times, "torch": torch.__version__, "transformers": tf.__version__}
    output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))


def cell(times: dict[str, list[float]], name: str, batch: int) -> str:
    """Sequences per second, and the ratio to the dense model."""
    ratio = statistics.median(dense / own for dense, own in zip(times["dense"], times[name], strict=True))
    return f"{batch / statistics.median(times[name]):.1f} (**{ratio:.2f}**)"


if __name__ == "__main__":
    typer.run(main)
