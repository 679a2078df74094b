"""What DAMRO's negative branch costs: time of the first token and of every further one, and memory of its kv cache.

A LLaVA with LLaVA-1.5's 576 image tokens, thin enough for a CPU and with random weights, generates with and without the
patch, in turn in one process; medians of the ratios are reported, so that a busy machine changes both alike.

    python benchmarks/damro_cost.py --output docs/results/damro_cost.md
"""

import datetime
import platform
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers as tf
import typer
from torch import nn

import patchattn
from patchattn.cache.memory import held_bytes
from patchattn.core.kv_caches import find_cache
from patchattn.decoding.variant import BranchTokens

IMAGE, VOCABULARY, PATCHES, TEXT = 31999, 32000, 576, 40


def thin_llava() -> Any:
    """LLaVA-1.5's picture (336 pixels, patches of 14) and vocabulary; everything else small."""
    torch.manual_seed(0)
    vision = tf.CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        image_size=336,
        patch_size=14,
    )
    text = tf.LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8, vocab_size=VOCABULARY
    )
    model = tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, image_seq_length=PATCHES)
    )
    model.generation_config.eos_token_id = None
    return model.eval()


def one_picture() -> dict[str, torch.Tensor]:
    """A picture and 40 tokens of text."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, 1000, (1, TEXT), generator=generator)
    ids = torch.cat([text[:, :5], torch.full((1, PATCHES), IMAGE), text[:, 5:]], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 336, 336, generator=generator),
    }


def seconds(model: Any, tokens: int) -> float:
    start = time.perf_counter()
    model.generate(**one_picture(), max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return time.perf_counter() - start


def times(model: Any, tokens: int) -> tuple[float, float]:
    """Milliseconds until the first token, and of each further one."""
    first, all_of_them = seconds(model, 1), seconds(model, tokens)
    return first * 1e3, (all_of_them - first) * 1e3 / (tokens - 1)


def cache_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of keys and values after the prompt: the model's own, and the branch's."""
    with torch.inference_mode():
        layers = find_cache(model(**one_picture(), use_cache=True).values()).layers
    border = next(index for index, layer in enumerate(layers) if isinstance(layer, BranchTokens))
    sizes = [held_bytes(layer) for layer in layers]
    return sum(sizes[:border]), sum(sizes[border:])


def row(name: str, pairs: list[tuple[float, float]]) -> str:
    """One line of the table, from (plain, patched) milliseconds."""
    ratios = [patched / plain for plain, patched in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    plain, patched = (statistics.median(values) for values in zip(*pairs, strict=True))
    return f"| {name} | {plain:.1f} | {patched:.1f} | **{middle:.2f}** ({low:.2f} to {high:.2f}) |"


def main(
    output: Annotated[Path, typer.Option(help="Markdown file to write.")],
    pairs: Annotated[int, typer.Option(help="How often both are timed.")] = 9,
    tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 17,
) -> None:
    """Measure and write the table."""
    model = thin_llava()
    size = sum(p.numel() for p in model.parameters()) / 1e6
    measured: list[tuple[tuple[float, float], tuple[float, float]]] = []
    seconds(model, 2)
    for _ in range(pairs):
        plain = times(model, tokens)
        with patchattn.patched(model, "damro"):
            measured.append((plain, times(model, tokens)))
    with patchattn.patched(model, "damro"):
        own, branch = cache_bytes(model)
    lines = [
        "# Cost of DAMRO's negative branch",
        "",
        f"{datetime.date.today()}, {platform.machine()} CPU, {torch.get_num_threads()} thread(s), Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {tf.__version__}, patchattn "
        f"{patchattn.__version__}.",
        "",
        f"`python benchmarks/damro_cost.py --pairs {pairs} --tokens {tokens}`: a LLaVA with random weights (not a real "
        f"model: {size:.1f} M parameters, float32), one picture of {PATCHES} image tokens and {TEXT} tokens of text, "
        "greedy, k = 10. Plain and patched are timed in turn; median of the ratios, quartiles in brackets. The machine "
        "was shared with other work, so that only the ratios mean something.",
        "",
        "| | plain ms | patched ms | ratio |",
        "|---|---|---|---|",
        row("first token (vision encoder and prompt)", [(p[0], d[0]) for p, d in measured]),
        row("each further token", [(p[1], d[1]) for p, d in measured]),
        "",
        f"Keys and values after the prompt: {own / 2**20:.2f} MiB, and {branch / 2**20:.2f} MiB for the negative "
        f"branch ({branch / own:.1%}), which holds {TEXT} tokens of text and 10 of the image.",
        "",
    ]
    output.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
