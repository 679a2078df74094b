"""Continued training of stories260K: MoH beside the dense model, SSA + LoRA beside LoRA. Runs, and tables of them.

    python benchmarks/stories260k.py train     # in a folder with the paths that stories260k/*.yaml name
    python benchmarks/stories260k.py tables

Every run leaves its figures in `runs/<configuration>_<seed>/metrics.json`; one that is there already is not run again.
"""

import json
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
    """Print the tables of the result page."""
    dense = _all("dense")
    gains = [one["before"]["perplexity"] - one["after"]["perplexity"] for one in dense]
    start = dense[0]["before"]["perplexity"]
    print("| model | untrained | after 50 | 100 | 150 | 200 steps | share of the dense model's gain |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in ("dense", "moh_875", "moh_75", "moh_50"):
        runs = _all(name)
        shares = [100 * (start - one["after"]["perplexity"]) / gain for one, gain in zip(runs, gains, strict=True)]
        print(f"| {name} | {_curve(runs)} | {_spread(shares, 1)} % |")
    print("\n| model | untrained | after 50 | 100 | 150 | 200 steps | trained parameters |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in ("lora", "ssa_lora", "ssa_fast_lora"):
        runs = _all(name)
        print(f"| {name} | {_curve(runs)} | {runs[0]['trained_parameters']:,} |")
    for name in ("ssa_lora", "ssa_fast_lora"):
        _coefficients(name)
    print("\n| run | untrained | trained | seconds |\n| --- | ---: | ---: | ---: |")
    for path in sorted(Path("runs").glob("*/metrics.json")):
        one = json.loads(path.read_text())
        ends = " | ".join(f"{one[when]['perplexity']:.3f}" for when in ("before", "after"))
        print(f"| {path.parent.name} | {ends} | {one['seconds']:.0f} |")
    print("\n", dense[0]["versions"])


def _all(name: str) -> list[dict[str, Any]]:
    """What the runs of a configuration measured, by seed."""
    return [json.loads(Path(f"runs/{name}_{seed}/metrics.json").read_text()) for seed in SEEDS]


def _curve(runs: list[dict[str, Any]]) -> str:
    points = zip(*[[point["perplexity"] for point in one["curve"]] for one in runs], strict=True)
    return " | ".join(_spread(list(values)) for values in points)


def _spread(values: list[float], digits: int = 2) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def _coefficients(name: str) -> None:
    """SSA's position coefficient sigmoid(alpha) and the norm of its token vector, per layer and stream."""
    print(
        f"\n{name}\n\n| layer | query: sigmoid(alpha) | query: norm of the token vector | value: sigmoid(alpha) | value: norm |"
    )
    print("| ---: | ---: | ---: | ---: | ---: |")
    runs = [load_file(f"runs/{name}_{seed}/patchattn_model.safetensors") for seed in SEEDS]
    for layer in range(len([key for key in runs[0] if key.endswith("query_alpha")])):
        cells = []
        for stream in ("query", "value"):
            prefix = f"model.layers.{layer}.self_attn.patchattn.ssa.{stream}"
            cells.append(_spread([float(tensors[f"{prefix}_alpha"].sigmoid()) for tensors in runs], 4))
            cells.append(_spread([float(tensors[f"{prefix}_token"].norm()) for tensors in runs], 3))
        print(f"| {layer} | {' | '.join(cells)} |")


if __name__ == "__main__":
    app()
