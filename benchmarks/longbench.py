"""LongBench: a causal language model plain and under a variant, scores and speed side by side.

    python benchmarks/longbench.py meta-llama/Llama-3.1-8B-Instruct --output runs/longbench --variant moh \\
        --set active_ratio=0.75 --task qasper --task hotpotqa --max-length 31500 --device cuda

Samples come from the Hub, or from a folder with official or MiniLongBench files (--data). They and the settings are
checked before the model is loaded. A killed run continues; `report.json` and `report.md` in the output folder hold the
result.
"""

from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import patchattn
from patchattn.evaluation.longbench import LongBenchSettings, compare_longbench, longbench_table
from patchattn.evaluation.longbench_data import load_longbench


def main(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model.")],
    output: Annotated[Path, typer.Option(help="Folder for answers and report.")],
    variant: Annotated[str | None, typer.Option(help="Variant to measure beside the plain model.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Its settings, active_ratio=0.75 say.")] = None,
    patch: Annotated[Path | None, typer.Option(help="Folder of a saved patch, instead of a variant.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Task, may be given several times; all 21 without.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with a file per task; the Hub without.")] = None,
    batch: Annotated[int, typer.Option(help="Prompts per call of generate.")] = 1,
    max_length: Annotated[int | None, typer.Option(help="Longest prompt, in tokens.")] = None,
    chat_template: Annotated[str, typer.Option(help="official, always or never.")] = "official",
    limit: Annotated[int | None, typer.Option(help="Samples per task.")] = None,
    seed: Annotated[int, typer.Option(help="For variants that draw random numbers.")] = 0,
    device: Annotated[str, typer.Option(help="Where the model runs.")] = "cpu",
) -> None:
    """Measure and print the table."""
    try:
        if (variant is None) == (patch is None) or (settings and variant is None):
            raise ValueError("Give --variant, and --set for its settings, or --patch.")
        given = _settings(settings or [])
        if variant is not None:
            patchattn.variant_info(variant).configure(given)
        asked = {"batch": batch, "max_length": max_length, "chat_template": chat_template, "limit": limit, "seed": seed}
        LongBenchSettings.from_dict(asked)
        samples = load_longbench(task, data)
        transformers.logging.set_verbosity_error()
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto").to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        if variant is None:
            patchattn.load_patch(loaded, patch)
        else:
            patchattn.patch_model(loaded, variant, given)
        report = compare_longbench(loaded, tokenizer, samples, output, **asked)
    except (TypeError, ValueError, NotImplementedError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(longbench_table(report))


def _settings(pairs: list[str]) -> dict[str, Any]:
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"--set expects name=value, such as active_ratio=0.75, got {pair!r}.")
    return {name: yaml.safe_load(value) for name, _, value in (pair.partition("=") for pair in pairs)}


if __name__ == "__main__":
    typer.run(main)
