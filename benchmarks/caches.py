"""Kv caches that forget: what they save of memory and time. What answers lose: `answers.py`.

Every number is of one process in which the dense model and a method take turns:

    python benchmarks/caches.py DIR --output runs/caches_cost.md
"""

import datetime
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

import patchattn
from patchattn.cache.tracked import TrackedLayer
from patchattn.core.kv_caches import cache_argument
from patchattn.evaluation.report.report import markdown_table

app = typer.Typer(add_completion=False)

SCORED = ("snapkv", "pyramidkv", "adakv", "h2o", "tova", "keydiff", "knorm", "expected_attention")
SINKS, DUO = 4, {"sinks": 16, "recent": 64}
CHUNK = 1024
Gates = list[list[float]]


def settings_of(method: str, share: float, length: int, gates: Gates) -> tuple[str, dict[str, Any]]:
    """A variant and its settings, with which of so many tokens that share is kept."""
    budget = int(share * length)
    if method == "buffered":
        return "knorm", {"budget": 1 << 30}
    if method == "streaming_llm":
        return method, {"sinks": SINKS, "recent": budget - SINKS, "slack": 0}
    if method.startswith("duo"):
        near = (DUO["sinks"] + DUO["recent"]) / length
        return "duo", {"gates": gates, "sparsity": min(1.0, (1.0 - share) / (1.0 - near)), "slack": 0, **DUO}
    if method == "think":  # values stay whole, so that half is its floor
        return method, {"ratio": min(2.0 * (1.0 - share), 0.95)}
    return method, {"budget": budget}


def random_gates(model: Any) -> Gates:
    """What gates that were learned are to be compared with."""
    config = model.config.get_text_config()
    return np.random.default_rng(0).random((config.num_hidden_layers, config.num_key_value_heads)).tolist()


def loaded(folder: Path, dtype: str, threads: int) -> Any:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval().to(device)


def conditions(model: nn.Module, dtype: str, threads: int) -> str:
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, {threads} threads"
    return (
        f"{datetime.date.today()}, {device}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, patchattn {patchattn.__version__}. {type(model).__name__}, "
        f"{parameters:.0f} M parameters, {dtype}."
    )


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def filled(model: Any, length: int) -> tuple[DynamicCache, float]:
    """A cache of a random text, fed in chunks, and the seconds it took."""
    ids = torch.randint(3, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=model.config)

    def run() -> None:
        for part in ids.to(model.device).split(CHUNK, dim=1):
            model(part, logits_to_keep=1, **cache_argument(model, cache))

    return cache, seconds(run)


def steps(model: Any, cache: DynamicCache, count: int) -> Callable[[], None]:
    token = torch.full((1, 1), 5, device=model.device)

    def run() -> None:
        for _ in range(count):
            model(token, **cache_argument(model, cache))

    return run


def held_tokens(cache: DynamicCache) -> float:
    """Numbers stored for each of the keys and values that were given, mean over layers."""
    shares = []
    for layer in cache.layers:
        parts = [layer, *((layer.apart or ())[1:] if isinstance(layer, TrackedLayer) else ())]
        firsts = [part.first for part in parts if isinstance(part, TrackedLayer) and part.first is not None]
        numbers = sum(tensor.numel() for part in (*parts, *firsts) for tensor in (part.keys, part.values))
        token = sum(tensor[:, :, 0].numel() for part in parts for tensor in (part.keys, part.values))
        shares.append(numbers / token / layer.get_seq_length())
    return statistics.mean(shares)


@app.command()
def cost(
    model: Annotated[Path, typer.Argument(help="Folder of a causal language model, such as SmolLM2.")],
    context: Annotated[list[int] | None, typer.Option(help="Tokens in the cache.")] = None,
    share: Annotated[float, typer.Option(help="Share of them that is kept.")] = 0.25,
    method: Annotated[list[str] | None, typer.Option(help="Methods; all by default.")] = None,
    rounds: Annotated[int, typer.Option(help="Turns of the dense model and a method.")] = 7,
    tokens: Annotated[int, typer.Option(help="Decoding steps of a turn.")] = 8,
    dtype: Annotated[str, typer.Option(help="Type of weights and cache.")] = "float32",
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    output: Annotated[Path | None, typer.Option(help="Markdown file to write.")] = None,
) -> None:
    """Memory of the cache and time of a decoding step, over those of the dense model."""
    base = loaded(model, dtype, threads)
    gates, rows = random_gates(base), []
    with torch.inference_mode():
        for length in context or [2048, 8192, 16384]:
            dense, dense_prefill = filled(base, length)
            for name in method or ["buffered", "streaming_llm", *SCORED, "think", "duo"]:
                variant, settings = settings_of(name, share, length, gates)
                patchattn.patch_model(base, variant, settings)
                cache, prefill = filled(base, length)
                steps(base, cache, 2)()
                stored, report = held_tokens(cache), patchattn.cache_report(cache)
                found, own, other = [], steps(base, cache, tokens), steps(base, dense, tokens)
                for turn in range(rounds + 1):
                    ours = seconds(own) if turn % 2 else None
                    with patchattn.unpatched(base):
                        theirs = seconds(other)
                    ours = seconds(own) if ours is None else ours
                    found.append((ours / tokens, theirs / tokens))
                patchattn.unpatch_model(base)
                ours, theirs = (1e3 * statistics.median(pair[side] for pair in found[1:]) for side in (0, 1))
                low, middle, high = statistics.quantiles(
                    [theirs / ours for ours, theirs in found[1:]], n=4, method="inclusive"
                )
                rows.append(
                    [
                        str(length),
                        name,
                        f"{stored:.3f}",
                        f"{report.ratio or 0.0:.3f}",
                        f"{theirs:.1f}",
                        f"{ours:.1f}",
                        f"**{middle:.2f}** ({low:.2f} to {high:.2f})",
                        f"{prefill / dense_prefill:.2f}",
                    ]
                )
                print(" | ".join(rows[-1]), flush=True)
    head = ["tokens", "method", "keys stored", "bytes allocated", "dense ms", "ms", "times faster", "prefill"]
    text = [
        "# What caches that forget save",
        "",
        conditions(base, dtype, threads),
        "",
        f"`python benchmarks/caches.py DIR --share {share} --rounds {rounds} --tokens {tokens}`, batch 1, a "
        f"prompt in chunks of {CHUNK}. `buffered` keeps everything. Keys and bytes are shares of a cache of "
        "everything, bytes with places to spare and what says which keys they are; milliseconds are of a "
        "decoding step, medians of turns; the ratio is a median with its quartiles; the prefill is one "
        "measurement over one of the dense model.",
        "",
        *markdown_table(head, rows, texts=2),
    ]
    print("\n".join(text))
    if output is not None:
        output.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
