"""The command `patchattn calibrate squeezed`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .calibrate import Device, Model, Modules, bar


def calibrate_squeezed(
    model: Model,
    prefix: Annotated[Path, typer.Argument(help="Text file: what every prompt will begin with, to the letter.")],
    output: Annotated[Path, typer.Option("--output", "--out", help="Where to write the clusters.")] = Path(
        "squeezed.safetensors"
    ),
    share: Annotated[float, typer.Option(help="How many clusters there are, of the keys.")] = 0.05,
    coarse: Annotated[
        float | None,
        typer.Option(help="How many clusters of clusters there are, of the keys; one level alone by default."),
    ] = None,
    window: Annotated[int, typer.Option(help="Last tokens of the prefix, which are always read.", min=1)] = 100,
    special: Annotated[
        bool, typer.Option("--special/--no-special", help="Whether prompts begin with the tokenizer's special tokens.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Seed of k-means.", min=0)] = 0,
    modules: Modules = None,
    device: Device = None,
) -> None:
    """Cluster the keys of a fixed prefix, for Squeezed Attention.

    `patch_model(model, "squeezed", clusters=OUTPUT)` then has what follows the prefix read the clusters that matter.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..files.documents import read_text
    from ..saving.pretrained import load_pretrained
    from ..variants.selection.squeezed import prefix_clusters
    from .common import quiet
    from .devices import choose_device

    text = read_text(prefix)
    quiet()
    tokens = load_pretrained(AutoTokenizer, model)(text, add_special_tokens=special).input_ids
    loaded = load_pretrained(AutoModelForCausalLM, model, dtype="auto").eval().to(choose_device(device))
    how = {"share": share, "coarse": coarse, "window": window, "seed": seed}
    console = Console(highlight=False)
    with bar(console, "layers", None) as move:
        found = prefix_clusters(
            loaded,
            tokens,
            share=share,
            coarse=coarse,
            window=window,
            seed=seed,
            modules=modules,
            progress=lambda done: move(done, None),
        )
    found.save(output, prefix=prefix.name, begins=text[:80], **how)
    sizes = " and ".join(map(str, found.sizes))
    console.print(
        f"{sizes} clusters in each kv head of {len(found.fine)} layers, of a prefix of {found.length} tokens. Wrote "
        f"{output}",
        soft_wrap=True,
    )
