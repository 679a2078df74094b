"""Attention in windows and neighbourhoods of an image against dense attention, in a vision tower on a CPU.

A model of DINOv2-small's shape with random weights: the time does not depend on them. The forms of the model take turns
in one process of one thread; time is what that thread took, and the least of all turns counts, so that a busy machine
changes little.

    python benchmarks/grid.py --output docs/results/grid_cpu.md
"""

import datetime
import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers as tf
import typer

import patchattn
from patchattn.core.chain import VariantChain
from patchattn.core.registry import temporarily_registered

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("plain", {}),
    "window 7": ("window", {"size": 7}),
    "neighborhood 7": ("neighborhood", {"kernel": 7}),
    "neighborhood 7, dilation 1 and 5": ("neighborhood", {"kernel": 7, "dilation": [1, 5]}),
    "halo 8 + 3": ("halo", {"block": 8, "halo": 3}),
    "axial": ("axial", {}),
    "maxvit": ("maxvit", {}),
}


class Plain(patchattn.Variant):
    """Changes nothing, so that dense attention is timed as the others are."""

    config_class = patchattn.VariantConfig

    def attend(self, call: patchattn.AttentionCall, inner: Any) -> Any:
        return inner(call)


def small(pixels: int) -> Any:
    """DINOv2-small's tower: 12 layers of 6 heads of 64, patches of 14."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 12}
    return tf.Dinov2Model(tf.Dinov2Config(**sizes, image_size=pixels, patch_size=14)).eval()


@contextmanager
def timed_attention() -> Iterator[list[float]]:
    """Yields a list to which each call of a patched attention adds what it took, projections left out."""
    taken: list[float] = []
    original = VariantChain.forward

    def forward(self: Any, *args: Any) -> Any:
        start = time.thread_time()
        output = original(self, *args)
        taken.append(time.thread_time() - start)
        return output

    VariantChain.forward = forward  # type: ignore[method-assign]
    try:
        yield taken
    finally:
        VariantChain.forward = original  # type: ignore[method-assign]


def once(model: Any, images: torch.Tensor) -> tuple[float, float]:
    """Seconds of attention, and of the whole forward."""
    with timed_attention() as taken, torch.inference_mode():
        start = time.thread_time()
        model(images)
        whole = time.thread_time() - start
    return sum(taken), whole


def main(
    output: Annotated[Path, typer.Option(help="Markdown file to write; the same name with .json gets all figures.")],
    pixels: Annotated[int, typer.Option(help="Side of the image; a multiple of 14.")] = 518,
    turns: Annotated[int, typer.Option(help="How often every form is timed.")] = 9,
) -> None:
    """Measure and write the table."""
    torch.set_num_threads(1)
    side, images = pixels // 14, torch.randn(1, 3, pixels, pixels)
    words = {"title": "", "summary": "", "extra_parameters": "none", "arxiv_id": None, "year": 2026}
    info = patchattn.VariantInfo(name="plain", variant=Plain, needs_training=False, **words)
    models, times, densities = {}, {}, {}
    with temporarily_registered(info):
        for name, (variant, settings) in FORMS.items():
            model = patchattn.patch_model(small(pixels), variant, settings)
            try:
                densities[name] = density(model, images) if variant != "plain" else 1.0
            except ValueError:  # a size that does not divide this image
                continue
            models[name], times[name] = model, []
        for turn in range(turns + 1):
            for name, model in models.items():
                taken = once(model, images)
                if turn:  # the first warms up
                    times[name].append(taken)
    least = {name: [min(column) for column in zip(*rows, strict=True)] for name, rows in times.items()}
    lines = [
        "# Attention within images, on a CPU",
        "",
        f"{datetime.date.today()}, {platform.machine()} CPU, 1 thread, Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {tf.__version__}, patchattn {patchattn.__version__}.",
        "",
        f"`python benchmarks/grid.py --pixels {pixels} --turns {turns}`: the shape of DINOv2-small (12 layers of 6",
        "heads of 64, patches of 14) with random weights, float32, SDPA, and one image of "
        f"{side} x {side} patches. The forms",
        "take turns in one process; times are the least of all turns, of the thread that computes. Attention is all",
        "that stands between the projections, planning included. Densities are keys read over keys seen, by patches",
        "and layers.",
        "",
        "| form | density | attention, ms | faster | whole model, ms | faster |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {densities[name]:.1%} | {1e3 * attention:.0f} | {least['dense'][0] / attention:.2f} | "
            f"{1e3 * whole:.0f} | {least['dense'][1] / whole:.2f} |"
            for name, (attention, whole) in least.items()
        ),
        "",
    ]
    output.write_text("\n".join(lines), encoding="utf-8")
    content = {"seconds": times, "torch": torch.__version__, "transformers": tf.__version__}
    output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))


def density(model: Any, images: torch.Tensor) -> float:
    """Share of keys that are read, mean of all patches and layers."""
    found: list[torch.Tensor] = []
    with torch.inference_mode(), patchattn.observe(model, lambda seen: found.append(seen.values["density"])):
        model(images)
    return float(torch.stack([each.float().mean() for each in found]).mean())


if __name__ == "__main__":
    typer.run(main)
