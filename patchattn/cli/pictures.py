"""Commands about pictures: `patchattn carve`, and `patchattn plot image-flow`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from .plot import Device, Output, Patch, Set, Title, VariantOption, save
from .plot_source import Source, check_output, image_inputs, opened_image

Model = Annotated[str, typer.Argument(help="Folder or Hub id of a LLaVA-1.5, LLaVA-NeXT or Qwen2.5-VL.")]
Picture = Annotated[Path, typer.Option("--image", help="The picture.")]


def carve(
    model: Model,
    question: Annotated[str, typer.Argument(help="About the picture; put into the chat template.")],
    picture: Picture,
    layer: Annotated[
        list[int] | None, typer.Option(help="A layer, from 0; may be repeated. By default 20 to 25, the paper's.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Tokens of an answer at most.", min=1)] = 32,
    share: Annotated[float, typer.Option(help="Share of the pixels that are kept, 0 to 1.")] = 0.2,
    device: Device = None,
    output: Annotated[Path, typer.Option(help="Where the cut goes: .png.")] = Path("cut.png"),
) -> None:
    """CARVE: answer a question about a picture, with those parts of it cut out that the question draws attention to."""
    from ..inspection.carve import LAYERS
    from ..inspection.carve import carve as run

    if output.suffix.lower() != ".png":
        raise ValueError(f"--output must end in .png, got {str(output)!r}.")
    image = opened_image(picture)
    _, processor, loaded = _loaded(model, None, None, None, device)
    found = run(loaded, processor, image, question, layers=layer or LAYERS, steps=steps, share=share)
    found.cut.save(output)
    console = Console(highlight=False)
    for name, said in (("picture alone", found.before), ("with the cut", found.answer)):
        console.print(f"{name}: {escape(said)}", soft_wrap=True)
    console.print(f"Cut from {found.box[:2]} to {found.box[2:]} of {image.size}; wrote {output}", soft_wrap=True)


def image_flow(
    model: Model,
    picture: Picture,
    prompt: Annotated[str, typer.Option(help="What to ask about it, or what names an object; put into the template.")],
    variant: VariantOption = None,
    settings: Set = None,
    patch: Patch = None,
    query: Annotated[str, typer.Option(help="Whose flow: last, text (mean), or the index of a token.")] = "last",
    threshold: Annotated[float, typer.Option(help="Boxes are around parts with so much of the largest flow.")] = 0.5,
    device: Device = None,
    title: Title = None,
    output: Output = Path("image-flow.png"),
) -> None:
    """Attention multiplied up through all layers, from a text to the parts of a picture, and boxes around these."""
    from ..inspection.vl_sam import image_flow as run
    from ..plotting.image_flow import plot_image_flow

    check_output(output)
    if query not in ("last", "text") and not query.isdecimal():
        raise ValueError(f"--query must be last, text or the index of a token, got {query!r}.")
    opened_image(picture)
    source, processor, loaded = _loaded(model, variant, settings, patch, device)
    inputs, seen = image_inputs(processor, picture, prompt, loaded)
    queries: Any = int(query) if query.isdecimal() else query
    found = run(loaded, inputs, queries=queries, threshold=threshold)
    save(plot_image_flow(seen, found, title=title or f"Attention flow to the image: {source.name}"), output)
    for box in found.boxes:
        edges = ", ".join(f"{edge:.2f}" for edge in (box.left, box.top, box.right, box.bottom))
        print(f"{edges}  {100 * box.share:.1f} %")


def _loaded(
    model: str, variant: str | None, settings: list[str] | None, patch: Path | None, device: str | None
) -> tuple[Source, Any, Any]:
    from transformers import AutoProcessor

    from ..saving.pretrained import load_pretrained

    source = Source(model, variant, settings, patch)
    processor = load_pretrained(AutoProcessor, source.base)
    if not hasattr(processor, "image_token"):
        raise ValueError(f"{model} takes no images: expected a LLaVA-1.5, LLaVA-NeXT or Qwen2.5-VL.")
    return source, processor, source.load(device)
