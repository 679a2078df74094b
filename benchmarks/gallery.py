"""The gallery of variants: what each does to which tokens reach which, as a small picture, by what a reader wants.

    python benchmarks/gallery.py docs   # writes docs/gallery.md, docs/gallery/NAME.png, and some.png, which is of a few

Pictures are measured, not drawn: a tiny random model, in float64, reads a text of 24 tokens and then 8 more one by one
from its kv cache, or as a whole where it is an encoder, or an image of 8 x 8 patches. Every token in turn is moved a
little. Row i, column j is how far the output of attention at token i then moves. Groups are those of the README.
"""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import patchattn
from patchattn.core.kv_caches import cache_argument
from patchattn.plotting.style import COLOURS

PROMPT, STEPS, SIDE = 24, 8, 8
MOVED = 1e-7  # so little that no choice of keys changes for it
SMALLEST = 1e-2  # of the greatest influence: where the colours begin
ROUNDING = 1e-6  # of the greatest influence: what differences as small as MOVED leave in float64
NOISE = 1.0  # of parameters that start where they change nothing
PIXELS = 128  # of a side
SOME = (
    "dense",
    "streaming",
    "power",
    "hip",
    "quest",
    "triangle",
    "snapkv",
    "tova",
    "recycled",
    "hat",
    "axial",
    "biformer",
)
README = Path(__file__).parents[1] / "README.md"
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "initializer_range": 0.2}


def groups() -> dict[str, list[str]]:
    """Title of each group of the README's tables to the variants in it."""
    text = README.read_text(encoding="utf-8").split("\n## Variants\n")[1].split("\n## ")[0]
    found = {}
    for part in text.split("\n### ")[1:]:
        title, _, rows = part.partition("\n")
        found[title] = re.findall(r"^\| \[`(\w+)`\]", rows, re.M)
    return found


def decoder(layers: int) -> Any:
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=layers, num_key_value_heads=2, vocab_size=64)
    return transformers.LlamaForCausalLM(config)


def encoder(layers: int) -> Any:
    config = transformers.BertConfig(**SIZES, num_hidden_layers=layers, vocab_size=64)
    return transformers.BertModel(config, add_pooling_layer=False)


def tower(layers: int) -> Any:
    config = transformers.ViTConfig(**SIZES, num_hidden_layers=layers, image_size=4 * SIDE, patch_size=4)
    return transformers.ViTModel(config, add_pooling_layer=False)


def of_decoder(model: Any) -> np.ndarray:
    length = PROMPT + STEPS
    tokens = texts(length)
    cache = transformers.DynamicCache(config=model.config)
    with attended(model) as outputs:
        for start, end in [(0, PROMPT), *((place, place + 1) for place in range(PROMPT, length))]:
            mask = torch.ones(len(tokens), end, dtype=torch.long)
            with moving(model.get_input_embeddings(), slice(start + 1, end + 1)):
                model(tokens[:, start:end], attention_mask=mask, **cache_argument(model, cache))
    return influence(torch.cat(outputs, dim=1))


def of_encoder(model: Any) -> np.ndarray:
    tokens = texts(PROMPT + STEPS)
    with attended(model) as outputs, moving(model.get_input_embeddings(), slice(1, None)):
        model(tokens, attention_mask=torch.ones_like(tokens))
    return influence(outputs[0])


def of_tower(model: Any) -> np.ndarray:
    """Of patches alone, without the class token."""
    pixels = torch.randn(1, 3, 4 * SIDE, 4 * SIDE, generator=torch.Generator().manual_seed(1)).double()

    with attended(model) as outputs, moving(model.embeddings, slice(None)):
        model(pixel_values=pixels.repeat(1 + SIDE**2, 1, 1, 1))
    return influence(outputs[0][:, 1:])


HOSTS: dict[str, tuple[Callable[[int], Any], Callable[[Any], np.ndarray]]] = {
    "a decoder": (decoder, of_decoder),
    "an encoder of texts": (encoder, of_encoder),
    "a vision tower": (tower, of_tower),
}


def texts(length: int) -> torch.Tensor:
    """`(1 + length, length)`: the same random tokens in each row."""
    return torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(6326)).repeat(1 + length, 1)


@contextmanager
def moving(embeddings: nn.Module, columns: slice) -> Iterator[None]:
    """Row 1 + j of what a module embeds has token j moved; it embeds these columns of a class token and tokens."""

    def move(module: nn.Module, given: Any, output: torch.Tensor) -> torch.Tensor:
        direction = torch.randn(output.shape[-1], generator=torch.Generator().manual_seed(2)).to(output.dtype)
        which = torch.eye(len(output), dtype=output.dtype)
        which[0, 0] = 0
        return output + MOVED * which[:, columns, None] * direction

    handle = embeddings.register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def attended(model: Any) -> Iterator[list[torch.Tensor]]:
    """What the last attention module gives, call by call."""
    outputs: list[torch.Tensor] = []
    last = model.get_submodule(patchattn.patch_info(model).sites[-1]["name"])

    def note(module: nn.Module, given: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handle = last.register_forward_hook(note)
    try:
        yield outputs
    finally:
        handle.remove()


def influence(outputs: torch.Tensor) -> np.ndarray:
    """`[i, j]` how far token i moves with token j, of outputs `(1 + T, T, width)`."""
    return ((outputs[1:] - outputs[:1]).norm(dim=-1).T / MOVED).numpy()


@torch.no_grad()
def measured(name: str | None, host: str, layers: int) -> tuple[np.ndarray, bool]:
    """Influence under a variant in the settings of its first example, and whether its parameters had to be moved."""
    make, of = HOSTS[host]
    torch.manual_seed(0)
    model = make(layers).eval().double()
    if name is None:
        return of(model), False
    before = of(model)
    patchattn.patch_model(model, name, dict(patchattn.variant_info(name).examples[0]))
    found = of(model)
    if not found.any():
        raise ValueError("nothing is left of attention")
    if not np.allclose(found, before, rtol=1e-4):
        return found, False
    for key, parameter in model.named_parameters():
        if ".patchattn." in key:
            parameter += NOISE * torch.randn_like(parameter)
    found = of(model)
    if np.allclose(found, before, rtol=1e-4):
        raise ValueError("attention is as without it")
    return found, True


def picture(name: str) -> tuple[np.ndarray, str]:
    """Of the first host that takes the variant, in one layer or in two, and a word on it.

    Raises:
        ValueError: it shows on none.
    """
    for layers, host in product((1, 2), HOSTS):
        try:
            found, was_moved = measured(name, host, layers)
        except (NotImplementedError, ValueError, TypeError):
            continue
        return found, f"{host}{', its parameters drawn at random' if was_moved else ''}"
    raise ValueError(f"{name} does not show in which tokens reach which.")


def drawn(found: np.ndarray) -> Image.Image:
    """Dark: nothing; colours are logarithmic."""
    high = np.quantile(found[found > 0], 0.99)
    shade = np.clip(1 - np.log(np.maximum(found, 1e-300) / high) / np.log(SMALLEST), 0, 1)
    rgb = (255 * colormaps[COLOURS](shade)[..., :3]).astype(np.uint8)
    rgb[found < ROUNDING * high] = 255
    side = PIXELS // len(found)
    return Image.fromarray(rgb.repeat(side, 0).repeat(side, 1)).quantize(16)


def some(folder: Path) -> None:
    """Pictures of `SOME` side by side, from the files."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(2, len(SOME) // 2).flat, SOME, strict=True):
        axes.imshow(Image.open(folder / f"{name}.png").convert("RGB"), interpolation="nearest")
        axes.set_title(name, fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(folder / "some.png", dpi=110)


def main(docs: Annotated[Path, typer.Argument(help="Folder of the documentation.")]) -> None:
    """Write the page and its pictures."""
    folder = docs / "gallery"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    text = [
        "# Gallery",
        "",
        *(__doc__ or "").split("\n\n")[2].splitlines(),
        "Yellow is much, dark blue little, on a logarithmic scale; white is nothing. Settings are those of the",
        "variant's first example, which are small. What shows in no such picture has none: work on logits or images'",
        "tokens, say.",
        "",
        "| dense decoder | dense vision tower |",
        "|---|---|",
        "| ![dense decoder](gallery/dense.png) | ![dense vision tower](gallery/dense_tower.png) |",
    ]
    drawn(measured(None, "a decoder", 1)[0]).save(folder / "dense.png", optimize=True)
    drawn(measured(None, "a vision tower", 1)[0]).save(folder / "dense_tower.png", optimize=True)
    for title, names in groups().items():
        text += ["", f"## {title}", "", "| | variant | what it does |", "|---|---|---|"]
        for name in names:
            try:
                found, host = picture(name)
            except ValueError as error:
                print(error, file=sys.stderr)
                shown, host = "", ""
            else:
                drawn(found).save(folder / f"{name}.png", optimize=True)
                shown, host = f"![{name}](gallery/{name}.png)", f" *{host[0].upper()}{host[1:]}.*"
            text.append(f"| {shown} | [`{name}`](variants/{name}.md) | {patchattn.variant_info(name).summary}{host} |")
    if all((folder / f"{name}.png").exists() for name in SOME):
        some(folder)
    (docs / "gallery.md").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
