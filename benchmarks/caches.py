"""Kv caches that forget: what they save of memory and time, and what answers lose, beside the dense model.

Every number is of one process in which the dense model and a method take turns, or answer the same prompts:

    python benchmarks/caches.py cost DIR --output runs/caches_cost.md
    python benchmarks/caches.py quality DIR --folder runs/caches --output docs/results/caches.md

`quality` goes on where it was stopped; `--minutes` ends it in between, and the page shows what there is.
"""

import datetime
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import patchattn
from patchattn.cache.tracked import TrackedLayer
from patchattn.core.kv_caches import cache_argument
from patchattn.evaluation.report.report import markdown_table
from patchattn.evaluation.run.compare import evaluate
from patchattn.evaluation.tasks.ruler import NiahSingle

app = typer.Typer(add_completion=False)

SCORED = ("snapkv", "pyramidkv", "adakv", "h2o", "tova", "keydiff", "knorm")
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


# --- memory and time --------------------------------------------------------------------------------------------------


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
    """Numbers of values stored for each that was given, mean over layers."""
    shares = []
    for layer in cache.layers:
        parts = [layer, *((layer.apart or ())[1:] if isinstance(layer, TrackedLayer) else ())]
        tensors = [part.values for part in parts]
        tensors += [part.first.values for part in parts if isinstance(part, TrackedLayer) and part.first is not None]
        token = sum(part.values[:, :, 0].numel() for part in parts)
        shares.append(sum(tensor.numel() for tensor in tensors) / token / layer.get_seq_length())
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
            for name in method or ["buffered", "streaming_llm", *SCORED, "duo"]:
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
        f"`python benchmarks/caches.py cost DIR --share {share} --rounds {rounds} --tokens {tokens}`, batch 1, a "
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


# --- answers ----------------------------------------------------------------------------------------------------------


@contextmanager
def patched(model: nn.Module, method: str, share: float, length: int, gates: Gates) -> Iterator[None]:
    variant, settings = settings_of(method, share, length, gates)
    patchattn.patch_model(model, variant, settings)
    try:
        yield
    finally:
        patchattn.unpatch_model(model)


def recalls(folder: Path) -> dict[int, float]:
    """Number of a prompt to whether its answer holds what was asked for, of those that are there."""
    lines = [line for path in sorted(folder.rglob("process_*.jsonl")) for line in path.read_text("utf-8").splitlines()]
    rows = [json.loads(line) for line in lines]
    return {row["index"]: float(all(text.lower() in row["pred"].lower() for text in row["expected"])) for row in rows}


def compared(found: Mapping[Any, float], dense: Mapping[Any, float]) -> tuple[int, float, float, float]:
    """Prompts that both answered, accuracy, difference to dense and its standard error, in percent."""
    shared = sorted(set(found) & set(dense))
    if not shared:
        return 0, math.nan, math.nan, math.nan
    differences = [100.0 * (found[key] - dense[key]) for key in shared]
    error = statistics.stdev(differences) / len(shared) ** 0.5 if len(shared) > 1 else math.nan
    return len(shared), 100.0 * statistics.mean(found[key] for key in shared), statistics.mean(differences), error


def page(folder: Path, lengths: list[int], shares: list[float], methods: list[str], about: list[str]) -> str:
    """The page of what has been answered so far."""
    dense = {(length, key): value for length in lengths for key, value in recalls(folder / f"dense_{length}").items()}
    head = [
        "method",
        "kept",
        *(f"{length} tokens, %" for length in lengths),
        "all, %",
        "minus dense",
        "error",
        "prompts",
    ]
    rows = []
    of_length = [
        compared(recalls(folder / f"dense_{length}"), recalls(folder / f"dense_{length}")) for length in lengths
    ]
    count, accuracy, _, _ = compared(dense, dense)
    rows.append(["dense", "1", *(f"{each[1]:.1f}" for each in of_length), f"{accuracy:.1f}", "", "", str(count)])
    for method in methods:
        for share in shares:
            own = {length: recalls(folder / f"{method}_{share}_{length}") for length in lengths}
            every = {(length, key): value for length, found in own.items() for key, value in found.items()}
            alone = [compared(own[length], recalls(folder / f"dense_{length}"))[1] for length in lengths]
            count, accuracy, difference, error = compared(every, dense)
            if count:
                numbers = [*(f"{each:.1f}" for each in alone), f"{accuracy:.1f}", f"{difference:+.1f}", f"{error:.1f}"]
                rows.append([method, f"{share:g}", *numbers, str(count)])
    return "\n".join([*about, "", *markdown_table(head, rows, texts=1)]) + "\n"


@app.command()
def quality(
    model: Annotated[Path, typer.Argument(help="Folder of a causal language model, such as SmolLM2.")],
    folder: Annotated[Path, typer.Option(help="Folder for answers; a run goes on from those that are there.")],
    length: Annotated[list[int] | None, typer.Option(help="Lengths of the prompts.")] = None,
    share: Annotated[list[float] | None, typer.Option(help="Shares of the keys that are kept.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Methods; all by default.")] = None,
    samples: Annotated[int, typer.Option(help="Prompts of each length.")] = 8,
    data: Annotated[str | None, typer.Option(help="Text that needles are hidden in; generated by default.")] = None,
    gates: Annotated[Path | None, typer.Option(help="Gates by `patchattn calibrate duo`, beside random ones.")] = None,
    minutes: Annotated[float, typer.Option(help="Begin no further run after so long.")] = 1e9,
    dtype: Annotated[str, typer.Option(help="Type of weights and cache.")] = "float32",
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    output: Annotated[Path | None, typer.Option(help="Markdown file to write.")] = None,
) -> None:
    """Needles in texts: the same prompts for the dense model and every method, compared in pairs."""
    lengths, shares = length or [1024, 2048], share or [0.5, 0.25]
    base, tokenizer = loaded(model, dtype, threads), AutoTokenizer.from_pretrained(model)
    end = time.time() + 60 * minutes
    drawn, learned = random_gates(base), None if gates is None else json.loads(gates.read_text("utf-8"))["gates"]
    methods = method or ["streaming_llm", *SCORED, "duo (random gates)", *([] if gates is None else ["duo"])]
    asked = {"samples": samples, "values": "numbers", "data": data, "max_new_tokens": 32}
    runs: list[tuple[str, float, int]] = [("dense", 1.0, each) for each in lengths]
    runs += [(name, kept, each) for kept in shares for name in methods for each in lengths]
    about = [
        "# What answers lose where a cache forgets",
        "",
        conditions(base, dtype, threads),
        "",
        f"`python benchmarks/caches.py quality DIR --samples {samples}`: `ruler/niah_single`, a number of seven digits "
        f"hidden in {'generated sentences' if data is None else 'a text'}, {samples} prompts of each length, the "
        "question at the end, where methods that look at the last queries see it. Greedy answers, the same prompts for "
        "every row. `kept` is the share of keys that a row's budget leaves; accuracy is the share of answers "
        "that say it. `minus dense` is the mean difference over prompts, `error` its standard error over "
        "pairs: where it is 0, every pair came out alike. Small numbers of prompts say little.",
    ]
    for name, kept, each in runs:
        if time.time() > end:
            print(f"Time is up before {name}, {kept:g}, {each} tokens: the next start goes on there.")
            break
        task = NiahSingle(**asked, lengths=[each])
        place = folder / (f"dense_{each}" if name == "dense" else f"{name}_{kept}_{each}")
        own = learned if name == "duo" and learned is not None else drawn
        with nullcontext() if name == "dense" else patched(base, name, kept, each, own):
            found = evaluate(base, tokenizer, [task], place, batch=1)
        print(f"{name}, {kept:g}, {each} tokens: {found[task.name]['scores']['recall']:.1f} %", flush=True)
    text = page(folder, lengths, shares, methods, about)
    print(text)
    if output is not None:
        output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    app()
