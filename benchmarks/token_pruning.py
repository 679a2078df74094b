"""What token pruning saves of a prefill: its time over that of the whole prompt, beside the same ratio of tokens.

    python benchmarks/token_pruning.py --output docs/results/token_pruning.md

A random model of LLaVA's shape, 576 image tokens among 640, and its language model alone: the clock runs from the call
of that module to its return, with the choice of tokens inside. Tokens are counted as layers get them. Both models are
timed in turn in one process, and the median of the ratios is told. Run it on an idle machine; `--counts` times nothing,
and tells the ratio of operations of matrix products, which do not depend on one (those of attention's kernel on a CPU
are not counted).
"""

import datetime
import platform
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import patchattn

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fastv, half of the images behind two layers": ("fastv", {"layer": 2, "ratio": 0.5}),
    "hiprune, a third of the images": ("hiprune", {"keep_ratio": 1 / 3, "middle_layer": 1}),
}
SIDE, TEXT, IMAGE = 24, 64, 999  # patches of a side, tokens of text, and the image token
LEAST, MOST = 0.9, 1.1  # of the time ratio over the token ratio


def model_of(width: int, layers: int) -> Any:
    """A random LLaVA with a small vision encoder."""
    torch.manual_seed(0)
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        vocab_size=1000,
    )
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=14 * SIDE,
        patch_size=14,
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, image_seq_length=SIDE**2)
    return LlavaForConditionalGeneration(config).eval()


def prompt(model: Any) -> dict[str, torch.Tensor]:
    """An image with text before and behind it."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, 900, (1, TEXT), generator=generator)
    image = torch.full((1, SIDE**2), IMAGE)
    ids = torch.cat([text[:, : TEXT // 2], image, text[:, TEXT // 2 :]], dim=1)
    pixels = torch.randn(1, 3, 14 * SIDE, 14 * SIDE, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


class Watched:
    """A prefill of the language model in a model: its seconds, its operations, and the tokens of all layers."""

    def __init__(self, model: Any, counts: bool) -> None:
        self.model, self.counts, self.given = model, counts, prompt(model)
        self.seconds, self.tokens, self.operations = 0.0, 0, 0

    def run(self) -> "Watched":
        self.tokens, counter = 0, FlopCounterMode(display=False)
        language_model = self.model.model.language_model

        def begin(module: Any, args: Any) -> None:
            if self.counts:
                counter.__enter__()
            self.seconds = -time.perf_counter()

        def end(module: Any, args: Any, output: Any) -> None:
            self.seconds += time.perf_counter()
            if self.counts:
                counter.__exit__(None, None, None)
                self.operations = counter.get_total_flops()

        def count(module: Any, args: Any, output: Any) -> None:
            self.tokens += (output[0] if isinstance(output, tuple) else output).shape[1]

        with ExitStack() as stack, torch.inference_mode():
            handles = [language_model.register_forward_pre_hook(begin), language_model.register_forward_hook(end)]
            handles += [layer.mlp.register_forward_hook(count) for layer in language_model.layers]
            for handle in handles:
                stack.callback(handle.remove)
            self.model(**self.given, logits_to_keep=1)
        return self


def row(model: Any, name: str, rounds: int, counts: bool) -> str:
    """A line of the table: the ratio of tokens, of what was measured, and of both."""
    variant, settings = CASES[name]
    found = []
    for number in range(1 if counts else rounds + 1):
        plain = Watched(model, counts).run()
        with patchattn.patched(model, variant, **settings):
            less = Watched(model, counts).run()
        spent = (less.operations / plain.operations) if counts else (less.seconds / plain.seconds)
        if counts or number:  # the first pair warms up
            found.append(spent)
    tokens, spent = less.tokens / plain.tokens, statistics.median(found)
    verdict = "yes" if LEAST <= spent / tokens <= MOST else "no"
    return (
        f"| {name} | {less.tokens} of {plain.tokens} | {tokens:.3f} | {spent:.3f} | {spent / tokens:.2f} | {verdict} |"
    )


def main(
    output: Annotated[Path | None, typer.Option(help="Markdown file to write.")] = None,
    width: Annotated[int, typer.Option(help="Width of the language model.", min=64)] = 1024,
    layers: Annotated[int, typer.Option(help="Layers of the language model.", min=3)] = 16,
    rounds: Annotated[int, typer.Option(help="Pairs of prefills that are timed.", min=1)] = 9,
    threads: Annotated[int | None, typer.Option(help="Threads; torch's default otherwise.", min=1)] = None,
    counts: Annotated[bool, typer.Option("--counts", help="Count operations in place of timing.")] = False,
) -> None:
    """Measure, print, and write the page."""
    if threads is not None:
        torch.set_num_threads(threads)
    model = model_of(width, layers)
    what = "operations" if counts else "time"
    how = "counted, nothing was timed" if counts else f"{torch.get_num_threads()} threads, median of {rounds} pairs"
    lines = [
        "# Prefills with fewer image tokens",
        "",
        f"{datetime.date.today()}, Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, patchattn {patchattn.__version__}, CPU ({platform.machine()}), float32, {how}.",
        "",
        f"`python benchmarks/token_pruning.py --width {width} --layers {layers}{' --counts' if counts else ''}`: a",
        f"random language model of {layers} layers, {width} wide, on one prompt of {SIDE**2} image tokens and {TEXT}",
        "of text. Tokens are those that layers get, summed over layers. The vision encoder is left out"
        f"{', and so is the kernel of attention itself' if counts else ''}.",
        "",
        f"| | tokens | ratio of tokens | ratio of {what} | {what} by tokens | within 10 % |",
        "|---|---|---|---|---|---|",
        *(row(model, name, rounds, counts) for name in CASES),
        "",
    ]
    print("\n".join(lines))
    if output is not None:
        output.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
