"""The commands `patchattn plot ...`: a picture of a model, or of results that are there, into a file."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .plot_source import Source, check_output, image_inputs, one_text, tokens_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

plot = typer.Typer(no_args_is_help=True, help="Draw what attention does, or what was measured, into a picture.")

Model = Annotated[str, typer.Argument(help="Folder or Hub id of a model; patched, if it was saved so.")]
VariantOption = Annotated[str | None, typer.Option("--variant", help="A variant, or several, as in ssa+moh.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting, such as active_ratio=0.5; moh.active_ratio=0.5 with several variants."),
]
Patch = Annotated[Path | None, typer.Option(help="Folder of a saved patch.")]
Prompt = Annotated[str | None, typer.Option(help="The text itself.")]
Text = Annotated[Path | None, typer.Option(help="A .txt, .jsonl or .tsv file, of which the first text is taken.")]
Texts = Annotated[Path, typer.Option("--text", help="Texts: a .txt, .jsonl or .tsv file, or a folder of these.")]
Layers = Annotated[list[int] | None, typer.Option("--layer", help="A layer, from 0; may be repeated. All by default.")]
Heads = Annotated[list[int] | None, typer.Option("--head", help="A head, from 0; may be repeated. All by default.")]
Modules = Annotated[str | None, typer.Option(help="Regular expression that chooses attention modules.")]
Samples = Annotated[int | None, typer.Option(help="Rows to use, from the first on; all by default.", min=1)]
Length = Annotated[int, typer.Option(help="Longest row, in tokens.", min=2)]
BatchSize = Annotated[int, typer.Option(help="Rows of a forward.", min=1)]
Device = Annotated[str | None, typer.Option(help="Device, such as cuda; a GPU by default where there is one.")]
Title = Annotated[str | None, typer.Option(help="Title of the picture.")]
Output = Annotated[Path, typer.Option(help="The picture: .png, .pdf or .svg.")]
Reports = Annotated[list[Path], typer.Argument(help="Output folders of `patchattn eval`, or their report.json.")]


@plot.command()
def heads(
    model: Model,
    text: Texts,
    variant: VariantOption = None,
    settings: Set = None,
    patch: Patch = None,
    samples: Samples = None,
    length: Length = 512,
    batch_size: BatchSize = 8,
    device: Device = None,
    title: Title = None,
    output: Output = Path("heads.png"),
) -> None:
    """How often each head is used, for a variant that chooses heads, such as moh."""
    from ..inspection.routing import routing_statistics
    from ..plotting import plot_head_usage

    check_output(output)
    source = Source(model, variant, settings, patch)
    usage = _run(source, routing_statistics, text, samples, length, batch_size, device).usage()
    save(plot_head_usage(usage, title=title or f"Use of heads: {source.name}"), output)


@plot.command()
def temperatures(
    model: Model,
    text: Texts,
    variant: VariantOption = None,
    settings: Set = None,
    patch: Patch = None,
    samples: Samples = None,
    length: Length = 512,
    batch_size: BatchSize = 8,
    device: Device = None,
    title: Title = None,
    output: Output = Path("temperatures.png"),
) -> None:
    """Temperatures of every layer, for a variant that has some, such as ssa, and how they sharpen attention."""
    from ..inspection.temperatures import temperature_statistics
    from ..plotting import plot_temperatures

    check_output(output)
    source = Source(model, variant, settings, patch)
    layers = _run(source, temperature_statistics, text, samples, length, batch_size, device).layers()
    save(plot_temperatures(layers, title=title or f"Temperatures: {source.name}"), output)


@plot.command()
def importance(
    scores: Annotated[Path, typer.Argument(help="Scores of heads, as `patchattn calibrate heads` writes them.")],
    title: Title = None,
    output: Output = Path("importance.png"),
) -> None:
    """Importance of every head, from a file."""
    from ..core.importance import HeadImportance
    from ..plotting import plot_head_importance

    check_output(output)
    save(plot_head_importance(HeadImportance.load(scores), title=title), output)


@plot.command()
def received(
    model: Model,
    prompt: Prompt = None,
    text: Text = None,
    variant: VariantOption = None,
    settings: Set = None,
    patch: Patch = None,
    layer: Layers = None,
    modules: Modules = None,
    length: Length = 512,
    before: Annotated[
        bool, typer.Option("--before", help="Draw the model without its patch above, in the same colours.")
    ] = False,
    device: Device = None,
    title: Title = None,
    output: Output = Path("received.png"),
) -> None:
    """Attention that each token receives, by layer, or by head of one --layer; attention sinks are marked."""
    from ..core.patching import unpatched
    from ..inspection.attention_maps import attention_received
    from ..plotting import plot_attention_received

    check_output(output)
    wanted, source = one_text(prompt, text), Source(model, variant, settings, patch)
    if before and not source.has_patch:
        raise ValueError("--before needs a patch to compare with: give --variant or --patch, or a model saved patched.")
    loaded = source.load(device)
    inputs, tokens = tokens_of(source.tokenizer(), wanted, length, loaded)
    found, plain = attention_received(loaded, inputs, layers=layer, modules=modules), None
    if before:
        with unpatched(loaded):
            plain = attention_received(loaded, inputs, layers=layer, modules=modules)
    where = f", layer {layer[0]}" if layer and len(layer) == 1 else ""
    labels = None if found[0].site.is_cross or found[0].share.shape[1] != len(tokens) else tokens
    title = title or f"Attention received: {source.name}{where}"
    save(plot_attention_received(found, before=plain, tokens=labels, title=title), output)


@plot.command("map")
def map_(
    model: Model,
    layer: Annotated[int, typer.Option(help="The layer, from 0.", min=0)],
    head: Annotated[int, typer.Option(help="The query head, from 0.", min=0)],
    prompt: Prompt = None,
    text: Text = None,
    variant: VariantOption = None,
    settings: Set = None,
    patch: Patch = None,
    modules: Modules = None,
    length: Length = 512,
    device: Device = None,
    title: Title = None,
    output: Output = Path("map.png"),
) -> None:
    """Attention of one head, queries x keys."""
    from ..inspection.attention_maps import attention_maps
    from ..plotting import plot_attention_map

    check_output(output)
    wanted, source = one_text(prompt, text), Source(model, variant, settings, patch)
    loaded = source.load(device)
    inputs, tokens = tokens_of(source.tokenizer(), wanted, length, loaded)
    found = attention_maps(loaded, inputs, layers=layer, heads=[head], modules=modules)
    if len(found) > 1:
        names = ", ".join(attention.site.name for attention in found)
        raise ValueError(f"Layer {layer} has several attention modules: choose one of {names} with --modules.")
    labels = None if found[0].site.is_cross else tokens
    save(plot_attention_map(found[0], tokens=labels, title=title), output)


@plot.command()
def grid(
    model: Model,
    prompt: Prompt = None,
    text: Text = None,
    variant: VariantOption = None,
    settings: Set = None,
    patch: Patch = None,
    layer: Layers = None,
    head: Heads = None,
    modules: Modules = None,
    resolution: Annotated[int, typer.Option(help="Most rows and columns of each map.", min=2)] = 48,
    length: Length = 512,
    device: Device = None,
    title: Title = None,
    output: Output = Path("grid.png"),
) -> None:
    """Small maps of all heads, a row per layer."""
    from ..inspection.attention_maps import attention_maps
    from ..plotting import plot_attention_grid

    check_output(output)
    wanted, source = one_text(prompt, text), Source(model, variant, settings, patch)
    loaded = source.load(device)
    inputs, _ = tokens_of(source.tokenizer(), wanted, length, loaded)
    found = attention_maps(loaded, inputs, layers=layer, heads=head, modules=modules, resolution=resolution)
    save(plot_attention_grid(found, title=title or f"Attention of heads: {source.name}"), output)


@plot.command("grid-mask")
def grid_mask(
    variant: Annotated[str, typer.Argument(help="A variant with masks over the patches of an image, such as window.")],
    size: Annotated[str, typer.Option(help="Rows and columns of patches, as in 16x16.")] = "16x16",
    query: Annotated[str, typer.Option(help="Row and column of the patch whose mask is drawn, from 0.")] = "7,7",
    settings: Set = None,
    layer: Annotated[
        list[int] | None, typer.Option(help="A layer, from 0; may be repeated. 0 and 1 by default.")
    ] = None,
    heads: Annotated[int, typer.Option(help="Query heads of a layer, for masks that differ between them.", min=1)] = 12,
    title: Title = None,
    output: Output = Path("grid-mask.png"),
) -> None:
    """What a patch of an image sees, as window, neighborhood, axial, halo and maxvit have it; no model is needed."""
    from ..inspection.grid_masks import grid_masks
    from ..plotting import plot_grid_masks
    from .common import parse_settings

    check_output(output)
    sides, place = (_two_numbers(*one) for one in ((size, "x", "--size"), (query, ",", "--query")))
    given = parse_settings(settings or [])
    found = grid_masks(variant, given, shape=sides, query=place, layers=layer or (0, 1), heads=heads)
    save(plot_grid_masks(found, title=title or f"What a patch sees: {variant}"), output)


@plot.command()
def rollout(
    model: Model,
    prompt: Prompt = None,
    text: Text = None,
    variant: VariantOption = None,
    settings: Set = None,
    patch: Patch = None,
    layer: Annotated[int, typer.Option(help="Behind which layer, from 0; -1 is the last.")] = -1,
    flow: Annotated[bool, typer.Option("--flow", help="Attention flow instead, of at most 64 tokens.")] = False,
    modules: Modules = None,
    length: Length = 512,
    device: Device = None,
    title: Title = None,
    output: Output = Path("rollout.png"),
) -> None:
    """What of each token reaches each output through all layers: attention rollout, or flow."""
    from ..inspection.rollout import attention_flow, attention_rollout
    from ..plotting import plot_rollout

    check_output(output)
    wanted, source = one_text(prompt, text), Source(model, variant, settings, patch)
    loaded = source.load(device)
    inputs, tokens = tokens_of(source.tokenizer(), wanted, length, loaded)
    found = (attention_flow if flow else attention_rollout)(loaded, inputs, modules=modules)
    title = title or f"Attention {'flow' if flow else 'rollout'}: {source.name}"
    save(plot_rollout(found, tokens=tokens, layer=layer, title=title), output)


@plot.command()
def image(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a LLaVA-1.5, LLaVA-NeXT or Qwen2.5-VL.")],
    picture: Annotated[Path, typer.Option("--image", help="The picture.")],
    prompt: Annotated[str, typer.Option(help="What to ask about it; put into the chat template.")],
    variant: VariantOption = None,
    settings: Set = None,
    patch: Patch = None,
    layer: Layers = None,
    head: Heads = None,
    query: Annotated[
        str,
        typer.Option(help="Whose attention: last (the token before the answer), text (mean), or an index."),
    ] = "last",
    device: Device = None,
    title: Title = None,
    output: Output = Path("image.png"),
) -> None:
    """Attention of a vision-language model's text to the parts of a picture."""
    from transformers import AutoProcessor

    from ..inspection.attention_maps import image_attention
    from ..plotting import plot_image_attention
    from ..saving.pretrained import load_pretrained

    check_output(output)
    if query not in ("last", "text") and not query.isdecimal():
        raise ValueError(f"--query must be last, text or the index of a token, got {query!r}.")
    if not picture.is_file():
        raise ValueError(f"There is no image {str(picture)!r}.")
    source = Source(model, variant, settings, patch)
    processor = load_pretrained(AutoProcessor, source.base)
    if not hasattr(processor, "image_token"):
        raise ValueError(f"{model} takes no images: expected a LLaVA-1.5, LLaVA-NeXT or Qwen2.5-VL.")
    loaded = source.load(device)
    inputs, seen = image_inputs(processor, picture, prompt, loaded)
    queries: Any = int(query) if query.isdecimal() else query
    found = image_attention(loaded, inputs, layers=layer, heads=head, queries=queries)
    save(plot_image_attention(seen, found, title=title or f"Attention to the image: {source.name}"), output)


@plot.command()
def needle(reports: Reports, title: Title = None, output: Output = Path("needle.png")) -> None:
    """How well a needle is found, by its depth and the length: a heat map per run of each report."""
    from ..evaluation.tasks.figures import plot_needle
    from ..evaluation.tasks.needle import needle_grid
    from .plot_reports import named_runs, task_rows

    check_output(output)
    grids = {name: needle_grid(task_rows(folder, run, "needle")) for name, folder, run, _ in named_runs(reports)}
    save(plot_needle(grids, title=title or "Needle in a haystack"), output)


@plot.command()
def pareto(
    reports: Reports,
    task: Annotated[str | None, typer.Option(help="Which task; may be left out where there is one.")] = None,
    cost: Annotated[
        str | None,
        typer.Option(help="Cost, such as tokens_per_second; by default the first that was measured of all runs."),
    ] = None,
    title: Title = None,
    output: Output = Path("pareto.png"),
) -> None:
    """Score over cost of all runs of one or several reports."""
    from ..plotting import plot_pareto
    from .plot_reports import pareto_points

    check_output(output)
    points, labels = pareto_points(reports, task, cost)
    save(plot_pareto(points, **labels, title=title or "Quality and cost"), output)


def _run(
    source: Source, collect: Any, text: Path, samples: int | None, length: int, batch_size: int, device: str | None
) -> Any:
    """What `collect`, a context manager around a model, collects over texts."""
    import torch

    from ..calibration.data import read_texts

    if not source.has_patch:
        raise ValueError(
            "This shows what a variant does: give --variant or --patch, or a model that was saved patched."
        )
    examples = read_texts(text)
    loaded = source.load(device)
    with collect(loaded) as statistics, torch.no_grad():
        for batch in batches_of(source, examples, loaded.device, samples, length, batch_size):
            loaded(**batch)
    return statistics


def batches_of(
    source: Source, examples: Any, device: Any, samples: int | None, length: int, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Inputs of the model, on its device."""
    from ..calibration.data import make_batches

    how: dict[str, Any] = {"length": length, "batch_size": batch_size, "samples": samples}
    for batch in make_batches(source.tokenizer(), examples, "causal" if source.decodes else "none", **how):
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def _two_numbers(text: str, between: str, option: str) -> tuple[int, int]:
    first, separator, second = text.partition(between)
    if not (separator and first.strip().isdecimal() and second.strip().isdecimal()):
        raise ValueError(f"{option} must be two numbers with {between!r} between them, got {text!r}.")
    return int(first), int(second)


def save(figure: "Figure", output: Path) -> None:
    figure.savefig(output, dpi=150)
    Console(highlight=False).print(f"Wrote {output}", soft_wrap=True)
