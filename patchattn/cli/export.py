"""`patchattn export`: a patched model as a plain checkpoint."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .common import parse_settings, quiet


def export_model(
    model: Annotated[
        str, typer.Argument(help="Folder or Hub id of a model that was saved patched, or of a plain one.")
    ],
    directory: Annotated[Path, typer.Argument(help="Folder to write, empty or new.")],
    variant: Annotated[
        str | None, typer.Option(help="What to patch a plain model with, as `patchattn list` names it.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting, such as sparsity=0.25; may be repeated.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of a file of weights.")] = "50GB",
) -> None:
    """Write a patched model as a plain transformers checkpoint, which loads without patchattn.

    Only what the model's own configuration and weights can say, and only if the plain model gives the same outputs. A
    PEFT adapter beside the patch is merged. The tokenizer or processor is copied along.
    """
    from transformers import AutoConfig

    from ..core.patching import patch_model
    from ..core.registry import variant_info
    from ..exporting.export import export
    from ..saving.checkpoint import from_pretrained
    from ..saving.pretrained import load_pretrained
    from ..saving.whole_model import model_class

    given = parse_settings(settings or [])
    if variant is None and given:
        raise ValueError("--set is of a variant: name it with --variant.")
    quiet()
    loaded: Any
    if variant is None:
        loaded = from_pretrained(model, dtype="auto")
        loaded = loaded.merge_and_unload() if hasattr(loaded, "merge_and_unload") else loaded
    else:
        variant_info(variant).configure(given)
        architectures = load_pretrained(AutoConfig, model).architectures or [None]
        loaded = load_pretrained(model_class(architectures[0]), model, dtype="auto", use_safetensors=True)
        patch_model(loaded, variant, given)
    error = export(loaded, directory, max_shard_size=max_shard_size)
    Console(highlight=False).print(
        f"Wrote {directory}: a plain {type(loaded).__name__}, whose outputs differ from the patched model's by at most "
        f"{error:.1e} of the largest.",
        soft_wrap=True,
    )
