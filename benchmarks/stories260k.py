"""Continued training of stories260K: MoH beside the dense model, SSA + LoRA beside LoRA. Runs, and tables of them.

    python benchmarks/stories260k.py train     # in a folder with the paths that stories260k/*.yaml name
    python benchmarks/stories260k.py tables
    python benchmarks/stories260k.py usage runs/moh_50_0 text/wikitext_heldout.txt

Every run leaves its figures in `runs/<configuration>_<seed>/metrics.json`; one that is there already is not run again.
"""

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from safetensors.torch import load_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "recipes"))

from finetune_causal_lm import CausalLMSettings, run  # noqa: E402, needs the line above

app = typer.Typer()
SEEDS = (0, 1, 2)
STEPS = ("untrained", "50 steps", "100", "150", "200")
STREAMS = ("query", "value")
Only = Annotated[list[str] | None, typer.Option(help="Configurations to run; all by default.")]


@app.command()
def train(only: Only = None) -> None:
    """Run every configuration with every seed."""
    for seed in SEEDS:
        for path in sorted((HERE / "stories260k").glob("*.yaml")):
            if not only or path.stem in only:
                settings = yaml.safe_load(path.read_text())
                run(CausalLMSettings.from_dict({**settings, "seed": seed, "output": f"runs/{path.stem}_{seed}"}))


@app.command()
def tables() -> None:
    """Print the tables of the result page, in Markdown."""
    dense = _all("dense")
    _heading(["configuration", *STEPS, "share of the dense gain, nats", "share, perplexity"])
    for name in ("dense", "moh_875", "moh_75", "moh_50"):
        pairs = list(zip(_all(name), dense, strict=True))
        nats = [
            100 * _gain(ours, reference, math.log) / _gain(reference, reference, math.log) for ours, reference in pairs
        ]
        plain = [100 * _gain(ours, reference, float) / _gain(reference, reference, float) for ours, reference in pairs]
        _row([name, *_curve(_all(name)), f"{_spread(nats, 1)} %", f"{_spread(plain, 1)} %"])
    _heading(["configuration", *STEPS, "trained parameters"])
    for name in ("lora", "lora_rank9", "ssa_lora", "ssa_fast_lora"):
        _row([name, *_curve(_all(name)), f"{_all(name)[0]['trained_parameters']:,}"])
    for name in ("ssa_lora", "ssa_fast_lora"):
        _coefficients(name)
    _heading(["run", "untrained", "trained", "seconds"])
    for path in sorted(Path("runs").glob("*/metrics.json")):
        one = json.loads(path.read_text())
        _row([path.parent.name, *(f"{one[end]['perplexity']:.3f}" for end in ("before", "after")), one["seconds"]])
    print("\n", dense[0]["versions"])


@app.command()
def usage(run: Path, text: Path, length: int = 256) -> None:
    """Print the share of tokens that keep each query head of a trained MoH model, layer by layer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import patchattn

    model = AutoModelForCausalLM.from_pretrained(run).eval()
    patchattn.load_patch(model, run)
    tokens = AutoTokenizer.from_pretrained(run)(text.read_text(), return_tensors="pt").input_ids[0]
    with patchattn.routing_statistics(model) as statistics_of, torch.no_grad():
        for rows in tokens[: len(tokens) // length * length].view(-1, length).split(32):
            model(rows)
    _heading(["layer", *(f"head {head}" for head in range(model.config.num_attention_heads))])
    for layer, shares in enumerate(statistics_of.usage()):
        _row([layer, *(f"{share:.3f}" for share in shares)])


def _heading(cells: list[str]) -> None:
    print()
    _row(cells)
    _row(["---", *["---:"] * (len(cells) - 1)])


def _row(cells: list[Any]) -> None:
    print(f"| {' | '.join(map(str, cells))} |")


def _all(name: str) -> list[dict[str, Any]]:
    """What the runs of a configuration measured, by seed."""
    return [json.loads(Path(f"runs/{name}_{seed}/metrics.json").read_text()) for seed in SEEDS]


def _gain(ours: dict[str, Any], reference: dict[str, Any], scale: Any) -> float:
    """How far training brought a model below the untrained dense one, in the scale of a function of perplexity."""
    return scale(reference["before"]["perplexity"]) - scale(ours["after"]["perplexity"])


def _curve(runs: list[dict[str, Any]]) -> list[str]:
    points = zip(*[[point["perplexity"] for point in one["curve"]] for one in runs], strict=True)
    return [_spread(list(values)) for values in points]


def _spread(values: list[float], digits: int = 2) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def _coefficients(name: str) -> None:
    """SSA's position coefficient sigmoid(alpha) and the norm of its token vector, per layer and stream."""
    print(f"\n{name}")
    _heading(["layer", *(f"{stream}: {what}" for stream in STREAMS for what in ("coefficient of log n", "norm of w"))])
    runs = [load_file(f"runs/{name}_{seed}/patchattn_model.safetensors") for seed in SEEDS]
    for layer in range(len([key for key in runs[0] if key.endswith("query_alpha")])):
        cells = []
        for stream in STREAMS:
            prefix = f"model.layers.{layer}.self_attn.patchattn.ssa.{stream}"
            cells.append(_spread([float(tensors[f"{prefix}_alpha"].sigmoid()) for tensors in runs], 5))
            cells.append(_spread([float(tensors[f"{prefix}_token"].norm()) for tensors in runs], 3))
        _row([layer, *cells])


if __name__ == "__main__":
    app()
