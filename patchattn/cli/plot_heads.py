"""The commands `patchattn plot entropy` and `directions`: pictures of what heads of a model do."""

from pathlib import Path
from typing import Annotated

import typer

from .plot import (
    BatchSize,
    Device,
    Layers,
    Length,
    Model,
    Modules,
    Output,
    Patch,
    Prompt,
    Samples,
    Set,
    Text,
    Texts,
    Title,
    VariantOption,
    batches_of,
    save,
)
from .plot_source import Source, check_output, one_text, tokens_of


def plot_entropy(
    model: Model,
    text: Texts,
    variant: VariantOption = None,
    settings: Set = None,
    patch: Patch = None,
    layer: Layers = None,
    modules: Modules = None,
    samples: Samples = None,
    length: Length = 512,
    batch_size: BatchSize = 8,
    device: Device = None,
    title: Title = None,
    output: Output = Path("entropy.png"),
) -> None:
    """How spread out the attention of every head is, layer by layer: 1 is even attention, 0 one key."""
    from ..calibration.data import read_texts
    from ..inspection.rollout import attention_entropy
    from ..plotting import plot_attention_entropy

    check_output(output)
    source, examples = Source(model, variant, settings, patch), read_texts(text)
    loaded = source.load(device)
    batches = batches_of(source, examples, loaded.device, samples, length, batch_size)
    found = attention_entropy(loaded, batches, layers=layer, modules=modules)
    save(plot_attention_entropy(found, title=title or f"Entropy of attention: {source.name}"), output)


def plot_directions(
    model: Model,
    layer: Annotated[int, typer.Option(help="The layer, from 0.", min=0)],
    head: Annotated[int, typer.Option(help="The query head, from 0.", min=0)],
    query: Annotated[int, typer.Option(help="Number of the token that attends, from 0.", min=0)],
    key: Annotated[int, typer.Option(help="Number of the token that it attends to, from 0.", min=0)],
    prompt: Prompt = None,
    text: Text = None,
    share: Annotated[
        float, typer.Option(help="Share of the logit that the directions used carry.", min=0, max=1)
    ] = 0.9,
    writers: Annotated[int, typer.Option(help="How many earlier heads are drawn.", min=1)] = 10,
    modules: Modules = None,
    length: Length = 512,
    device: Device = None,
    title: Title = None,
    output: Output = Path("directions.png"),
) -> None:
    """Which singular directions of a head's weights carry a pair of tokens, and which earlier heads write there."""
    from ..inspection.attention_directions import attention_directions
    from ..plotting import plot_attention_directions

    check_output(output)
    wanted, source = one_text(prompt, text), Source(model)
    loaded = source.load(device)
    inputs, tokens = tokens_of(source.tokenizer(), wanted, length, loaded)
    ids = inputs["input_ids"][0].tolist()
    how = {"layer": layer, "head": head, "query": query, "key": key}
    found = attention_directions(loaded, ids, **how, share=share, modules=modules)
    pair = f"{tokens[query]!r} ({query}) to {tokens[key]!r} ({key})"
    title = title or f"Layer {layer}, head {head}, {pair}: {source.name}"
    save(plot_attention_directions(found, writers=writers, title=title.replace("$", r"\$")), output)
