"""Kv caches that forget: what they save of memory and time. What answers lose: `answers.py`.

Rows are appended to a file one by one, so that each command may be stopped and goes on where it was; `page` writes them
into tables, with each goal beside its figure. `memory` needs no idle machine, the others do:

    python benchmarks/caches.py memory DIR
    python benchmarks/caches.py decode DIR
    python benchmarks/caches.py prefill DIR
    python benchmarks/caches.py page DIR
"""

import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import torch
import transformers
import typer
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, DynamicCache

import patchattn
from patchattn.cache.tracked import TrackedLayer
from patchattn.core.chain import chains_in
from patchattn.core.kv_caches import cache_argument

sys.path.insert(0, str(Path(__file__).parent))

import cache_formula
from cache_page import written
from paired_rows import append_row, read_rows
from published import SMOL, needed

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
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()}, {threads} thread{'s' * (threads > 1)}"
    )
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
    token, given = torch.full((1, 1), 5, device=model.device), cache_argument(model, cache)

    def run() -> None:
        for _ in range(count):
            model(token, **given)

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


# --- methods and caches -----------------------------------------------------------------------------------------------

SHARE, TAIL, STEPS = 0.25, 64, 2
METHODS = ("buffered", "streaming_llm", *SCORED, "think", "duo")
# The settings that goals are about.
AT_2K = {name: (name.split()[0], 2048) for name in ("streaming_llm 2k", "snapkv 2k", "knorm 2k")}
HALF = "duo half"
SUMS = ("h2o", "expected_attention")  # need all queries of a text
CONTEXTS = [2048, 8192, 16384]

Folder = Annotated[Path, typer.Argument(help="Folder of a causal language model.", default_factory=needed(SMOL))]
Contexts = Annotated[list[int] | None, typer.Option(help="Tokens in the cache.")]
Methods = Annotated[list[str] | None, typer.Option(help="Methods; all by default.")]
Rows = Annotated[Path, typer.Option(help="File of rows; those that are there are not measured again.")]
Dtype = Annotated[str, typer.Option(help="Type of weights and cache.")]
Threads = Annotated[int, typer.Option(help="Threads of torch.")]
ROWS = Path("docs/results/caches/cost.jsonl")


def method_of(name: str, length: int, gates: Gates) -> tuple[str, dict[str, Any]]:
    """A variant and its settings, by the name of a row."""
    if name in AT_2K:
        method, budget = AT_2K[name]
        return settings_of(method, budget / length, length, gates)
    if name == HALF:
        return "duo", {"gates": gates, "sparsity": 0.5, "slack": 0, "sinks": 64, "recent": 256}
    return settings_of(name, SHARE, length, gates)


def names_for(length: int, given: list[str] | None) -> list[str]:
    return given or [*METHODS, HALF, *(AT_2K if length > 2048 else ())]


def random_cache(model: Any, length: int) -> DynamicCache:
    """Keys and values of so many tokens, drawn at random."""
    sizes, cache = cache_formula.Sizes.of(model), DynamicCache(config=model.config)
    generator, shape = torch.Generator().manual_seed(0), (1, sizes.kv_heads, length, sizes.width)
    for layer in range(sizes.layers):
        pair = (torch.randn(shape, generator=generator).to(model.device, model.dtype) for _ in range(2))
        cache.update(*pair, layer)
    return cache


@contextmanager
def sketched(model: Any) -> Iterator[None]:
    """A forward in which attention and feed-forward layers give zero, and sums over queries are drawn: it fills the
    caches of variants that need every query of a text, in a fraction of the time."""
    with ExitStack() as stack:
        zero = mock.patch.object(
            torch.nn.functional, "scaled_dot_product_attention", lambda query, *_, **__: torch.zeros_like(query)
        )
        stack.enter_context(zero)
        drawn = "patchattn.variants.eviction.h2o.column_mass"
        sums = lambda query, key, *_, **__: (torch.rand(*query.shape[:2], key.shape[2]), None)  # noqa: E731
        stack.enter_context(mock.patch(drawn, sums))
        for layer in model.get_decoder().layers:
            stack.enter_context(mock.patch.object(layer.mlp, "forward", torch.zeros_like))
        yield


def compressed(model: Any, variant: str, dense: DynamicCache, length: int) -> DynamicCache:
    """A cache of so many tokens and two more under a patch: random keys, but for a text's last tokens."""
    if variant in SUMS:
        with sketched(model):
            cache, _ = filled(model, length)
    else:
        cache = DynamicCache(config=model.config)
        for index, layer in enumerate(dense.layers):
            cache.update(layer.keys[:, :, : length - TAIL], layer.values[:, :, : length - TAIL], index)
        model(ends_of(model), logits_to_keep=1, **cache_argument(model, cache))
    steps(model, cache, STEPS)()
    return cache


def ends_of(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, model.config.vocab_size, (1, TAIL), generator=generator).to(model.device)


@contextmanager
def patched(model: Any, name: str, length: int, gates: Gates) -> Iterator[tuple[str, dict[str, Any]]]:
    variant, settings = method_of(name, length, gates)
    patchattn.patch_model(model, variant, settings)
    try:
        yield variant, settings
    finally:
        patchattn.unpatch_model(model)


# --- memory -----------------------------------------------------------------------------------------------------------


def transient(run: Callable[[], Any]) -> int:
    """Bytes that tensors take up at most while something runs, beyond those that were there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(accumulate(changes), default=0)


@app.command()
def memory(
    model: Folder,
    context: Contexts = None,
    method: Methods = None,
    rows: Rows = ROWS,
    dtype: Dtype = "float32",
    threads: Threads = 1,
) -> None:
    """Bytes of caches beside the formula."""
    base = loaded(model, dtype, threads)
    sizes, gates, about = cache_formula.Sizes.of(base), random_gates(base), conditions(base, dtype, threads)
    known = read_rows(rows)
    with torch.inference_mode():
        for length in context or CONTEXTS:
            todo = [n for n in ["plain", *names_for(length, method)] if f"memory/{length}/{n}" not in known]
            if not todo:
                continue
            dense = random_cache(base, length)
            whole = cache_formula.dense(sizes, length + STEPS)
            for name in todo:
                if name == "plain":
                    cache, counted = DynamicCache(config=base.config), whole
                    for index, layer in enumerate(dense.layers):
                        cache.update(layer.keys, layer.values, index)
                    steps(base, cache, STEPS)()
                    found = patchattn.cache_report(cache).stored_bytes
                else:
                    with patched(base, name, length, gates) as (variant, settings):
                        cache = compressed(base, variant, dense, length)
                        found = patchattn.cache_report(cache).stored_bytes
                        counted = cache_formula.stored(variant, sizes, settings, length, STEPS, cache)
                row = {"bytes": found, "formula": counted, "dense": whole, "about": about}
                append_row(rows, f"memory/{length}/{name}", row)
                print(length, name, f"{found / whole:.3f} of dense, formula {found / counted - 1:+.2%}", flush=True)
                del cache


# --- time -------------------------------------------------------------------------------------------------------------


@app.command()
def decode(
    model: Folder,
    context: Contexts = None,
    method: Methods = None,
    rounds: Annotated[int, typer.Option(help="Turns of the dense model and a method; one more warms up.")] = 5,
    tokens: Annotated[int, typer.Option(help="Decoding steps of a turn.")] = 4,
    rows: Rows = ROWS,
    dtype: Dtype = "float32",
    threads: Threads = 2,
) -> None:
    """Milliseconds of a decoding step, a method and the plain model in turn, and the most bytes that the cache and what
    a step makes take up. On an idle machine."""
    base = loaded(model, dtype, threads)
    gates, known, about = random_gates(base), read_rows(rows), conditions(base, dtype, threads)
    with torch.inference_mode():
        for length in sorted(context or CONTEXTS, reverse=True):
            todo = [n for n in names_for(length, method) if f"decode/{length}/{n}" not in known]
            dense = random_cache(base, length) if todo else None
            for name in todo:
                with patched(base, name, length, gates) as (variant, _):
                    cache = compressed(base, variant, dense, length)
                    own, other = steps(base, cache, tokens), steps(base, dense, tokens)
                    found: list[tuple[float, float]] = []
                    for turn in range(rounds + 1):
                        ours = seconds(own) if turn % 2 else None
                        with patchattn.unpatched(base):
                            theirs = seconds(other)
                        ours = seconds(own) if ours is None else ours
                        found.append((1e3 * ours / tokens, 1e3 * theirs / tokens))
                    peaks = {"peak": patchattn.cache_report(cache).stored_bytes + transient(steps(base, cache, 1))}
                    with patchattn.unpatched(base):
                        whole = sum(layer.keys.nbytes + layer.values.nbytes for layer in dense.layers)
                        peaks["plain_peak"] = whole + transient(steps(base, dense, 1))
                times = {"ms": [ours for ours, _ in found[1:]], "plain_ms": [theirs for _, theirs in found[1:]]}
                append_row(rows, f"decode/{length}/{name}", {**times, **peaks, "about": about})
                faster = statistics.median(theirs / ours for ours, theirs in found[1:])
                print(length, name, f"{faster:.2f} times plain transformers", flush=True)
                del cache


@app.command()
def prefill(
    model: Folder,
    length: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 2048,
    method: Methods = None,
    rounds: Annotated[int, typer.Option(help="Prompts of each method; one more warms up.")] = 2,
    rows: Rows = ROWS,
    dtype: Dtype = "float32",
    threads: Threads = 2,
) -> None:
    """What share of a prompt's time goes into deciding which keys stay, and dropping the others. On an idle machine."""
    base = loaded(model, dtype, threads)
    gates, known, about = random_gates(base), read_rows(rows), conditions(base, dtype, threads)
    ids = torch.randint(3, base.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    for name in method or [each for each in METHODS if each != "buffered"]:
        if f"prefill/{length}/{name}" in known:
            continue
        with torch.inference_mode(), patched(base, name, length, gates):
            spent, found = [0.0], []
            for chain in chains_in(base):
                for variant in chain.variants().values():
                    count_time(variant, spent)
            for _ in range(rounds + 1):
                spent[0], cache = 0.0, DynamicCache(config=base.config)
                prompt = lambda: base(ids, logits_to_keep=1, **cache_argument(base, cache))  # noqa: E731, B023
                whole = seconds(lambda: (prompt(), steps(base, cache, 1)()))  # noqa: B023
                found.append((spent[0], whole))
            shares = [own / (whole - own) for own, whole in found[1:]]
        append_row(rows, f"prefill/{length}/{name}", {"shares": shares, "seconds": found[1:], "about": about})
        print(length, name, f"{100 * statistics.median(shares):.2f} % of a prompt", flush=True)


def count_time(variant: Any, spent: list[float]) -> None:
    """Add up the seconds of what a variant does besides attention: it then holds that as an attribute of its own."""
    for name in ("forget", "rule", "_observe", "_chosen"):
        whole = getattr(variant, name, None)
        if whole is None:
            continue

        def counted(*args: Any, _whole: Any = whole, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = _whole(*args, **kwargs)
            spent[0] += time.perf_counter() - start
            return result

        setattr(variant, name, counted)


@app.command()
def page(
    rows: Rows = ROWS,
    output: Annotated[Path | None, typer.Option(help="Markdown file to write.")] = None,
) -> None:
    """Write what there is into tables."""
    text = written(read_rows(rows))
    print(text)
    if output is not None:
        output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    app()
