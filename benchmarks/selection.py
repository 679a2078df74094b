"""Attention that reads some keys on a CPU, selector included, beside dense attention to all of them.

One layer of random weights attends, and its call is repeated: what is compared takes turns in one process, and the
processor's time of this thread alone is counted; `model` is of whole decoding steps, by the clock. Rows are appended
to a file one by one, so that each command may be stopped and goes on where it was; `page` writes the table, with each
goal beside its figure. Run it on an idle machine:

    python benchmarks/selection.py decode
    python benchmarks/selection.py prefill
    python benchmarks/selection.py lists
    python benchmarks/selection.py model DIR
    python benchmarks/selection.py page
"""

import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import transformers
import typer
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import patchattn
from patchattn.core.call import AttentionCall
from patchattn.core.kv_caches import cache_argument
from patchattn.reading.selection import SelectionVariant
from patchattn_kernels import AttentionRule, BlockLists, block_sparse_attention

sys.path.insert(0, str(Path(__file__).parent))

from caches import compressed, conditions, filled, loaded, patched, random_cache, seconds, sketched, steps
from paired_rows import append_row, read_rows
from published import SMOL, needed
from selection_page import written

HEADS, KV_HEADS, DIM = 16, 4, 64
Runs = dict[str, Callable[[], Any]]
app = typer.Typer(add_completion=False)

Repeats = Annotated[int, typer.Option(help="Timed rounds; one more warms up.")]
Rows = Annotated[Path, typer.Option(help="File of rows; those that are there are not measured again.")]
ROWS = Path("docs/results/selection/speed.jsonl")
SINKS, RECENT, BLOCK = 64, 256, 64


def in_turn(runs: Runs, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every round, after one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(repeats + 1):
        for name, run in runs.items():
            start = time.thread_time()
            run()
            if round_number:
                times[name].append((time.thread_time() - start) * 1e3)
    return times


def built(longest: int) -> LlamaForCausalLM:
    sizes = {"hidden_size": HEADS * DIM, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": DIM}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=longest)).eval()


def timed(
    variant: str, settings: dict[str, Any], lengths: list[int], dense: Callable[[AttentionCall], Runs], repeats: int
) -> tuple[dict[str, list[float]], float]:
    """Times of a variant's attention, whole, and of dense baselines in the last of a text's calls; and the density.

    Args:
        variant: its name.
        settings: of it.
        lengths: tokens of each call.
        dense: of that call, the baselines by name.
        repeats: how many rounds.
    """
    model, found, densities = built(sum(lengths)), {}, []
    patchattn.patch_model(model, variant, **settings)
    attend = SelectionVariant.attend

    def repeated(self: SelectionVariant, call: AttentionCall, inner: Any) -> Any:
        if call.mask.columns == sum(lengths):
            found.update(in_turn({**dense(call), variant: lambda: attend(self, call, inner)}, repeats))
        return attend(self, call, inner)

    def observed(observation: Any) -> None:
        densities.append(float(observation.values["density"].mean()))

    cache = DynamicCache(config=model.config)
    with torch.inference_mode(), mock.patch.object(SelectionVariant, "attend", repeated):
        for length in lengths:
            model(input_ids=torch.randint(64, (1, length)), **cache_argument(model, cache), logits_to_keep=1)
    with torch.inference_mode(), patchattn.observe(model, observed):  # a run of its own: to report takes time
        cache = DynamicCache(config=model.config)
        for length in lengths:
            model(input_ids=torch.randint(64, (1, length)), **cache_argument(model, cache), logits_to_keep=1)
    return found, densities[-1]


@app.command()
def decode(
    keys: Annotated[list[int], typer.Option(help="Keys in the cache.")] = [4096, 16384],  # noqa: B006
    share: Annotated[list[float], typer.Option(help="Share of the keys that is read.")] = [0.05, 0.1],  # noqa: B006
    page: Annotated[list[int], typer.Option(help="Keys of a page.")] = [16, 64],  # noqa: B006
    repeats: Repeats = 30,
    rows: Rows = ROWS,
) -> None:
    """One token of Quest, with a choice of pages per kv head, beside dense attention as sdpa and with grouped rows."""
    begin()
    for length in keys:
        for part in share:
            for size in page:
                key = f"decode/{length}/quest, pages of {size}, {part:.0%}"
                settings = {"budget": int(part * length), "page": size, "dense_layers": 0}
                save(rows, key, lambda: timed("quest", settings, [length - 1, 1], _dense_step, repeats))  # noqa: B023


def _dense_step(call: AttentionCall) -> Runs:
    grouped = call.query.reshape(1, KV_HEADS, -1, DIM)
    return {
        "sdpa": lambda: scaled_dot_product_attention(call.query, call.key, call.value, enable_gqa=True),
        "grouped rows": lambda: scaled_dot_product_attention(grouped, call.key, call.value),
    }


@app.command()
def prefill(
    tokens: Annotated[list[int], typer.Option(help="Lengths of prompts.")] = [2048, 4096, 8192],  # noqa: B006
    repeats: Repeats = 5,
    flex: Annotated[bool, typer.Option(help="Whether compiled FlexAttention runs beside it.")] = True,
    rows: Rows = ROWS,
) -> None:
    """A prompt under `streaming` (64 sinks, 256 recent keys) and `triangle`, beside dense causal attention."""
    begin()
    for length in tokens:
        baselines = _dense_and_flex(length) if flex else _dense_prompt
        save(rows, f"prefill/{length}/streaming", lambda: timed("streaming", WINDOW, [length], baselines, repeats))  # noqa: B023
        save(
            rows,
            f"prefill/{length}/triangle",
            lambda: timed("triangle", {"dense_layers": 0}, [length], _dense_prompt, repeats),  # noqa: B023
        )


WINDOW = {"sinks": SINKS, "recent": RECENT}


def _dense_prompt(call: AttentionCall) -> Runs:
    operands = (call.query, call.key, call.value)
    return {"sdpa": lambda: scaled_dot_product_attention(*operands, is_causal=True, enable_gqa=True)}


def _dense_and_flex(length: int) -> Callable[[AttentionCall], Runs]:
    def visible(b: torch.Tensor, h: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= row) & ((key < SINKS) | (row - key < RECENT))

    blocks = create_block_mask(visible, None, None, length, length, device="cpu")
    attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def baselines(call: AttentionCall) -> Runs:
        operands = (call.query, call.key, call.value)
        return {
            **_dense_prompt(call),
            "FlexAttention": lambda: attend(*operands, block_mask=blocks, enable_gqa=True),
        }

    return baselines


@app.command()
def lists(
    tokens: Annotated[list[int], typer.Option(help="Lengths of prompts.")] = [8192],  # noqa: B006
    share: Annotated[float, typer.Option(help="Share of the blocks that is read.")] = 0.25,
    repeats: Repeats = 5,
    rows: Rows = ROWS,
) -> None:
    """A prompt whose queries read random blocks of keys, the same for all heads, beside dense causal attention."""
    begin()
    for length in tokens:
        save(rows, f"lists/{length}/shared lists, {share:.0%}", lambda: _listed(length, share, repeats))  # noqa: B023


def _listed(length: int, share: float, repeats: int) -> tuple[dict[str, list[float]], float]:
    query = torch.randn(1, HEADS, length, DIM)
    key, value = torch.randn(2, 1, KV_HEADS, length, DIM)
    chosen = shared_lists(length, share)
    pairs = int(chosen.counts.sum()) * BLOCK**2 - length * (BLOCK - 1) // 2  # half of each own block
    runs: Runs = {
        "sdpa": lambda: scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True),
        "lists": lambda: block_sparse_attention(query, key, value, chosen, AttentionRule(DIM**-0.5, causal=True)),
    }
    with torch.inference_mode():
        return in_turn(runs, repeats), pairs / (length * (length + 1) / 2)


def shared_lists(length: int, share: float) -> BlockLists:
    """Of every block of queries its own block, and others before it at random."""
    count = length // BLOCK
    indices, counts = torch.zeros(1, 1, count, count, dtype=torch.int32), torch.zeros(1, 1, count, dtype=torch.int32)
    for block in range(count):
        others = torch.randperm(block)[: max(0, round(share * (block + 1)) - 1)]
        own = torch.cat([others.sort().values, torch.tensor([block])]).int()
        indices[0, 0, block, : len(own)], counts[0, 0, block] = own, len(own)
    return BlockLists(indices[..., : int(counts.max())], counts, BLOCK, BLOCK)


@app.command()
def model(
    folder: Annotated[Path, typer.Argument(help="Folder of a causal language model.", default_factory=needed(SMOL))],
    context: Annotated[list[int], typer.Option(help="Tokens in the cache.")] = [8192, 16384],  # noqa: B006
    share: Annotated[float, typer.Option(help="Share of the keys that is read.")] = 0.1,
    page: Annotated[int, typer.Option(help="Keys of a page.")] = 64,
    rounds: Annotated[int, typer.Option(help="Turns of each; one more warms up.")] = 7,
    tokens: Annotated[int, typer.Option(help="Decoding steps of a turn.")] = 4,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    rows: Rows = ROWS,
) -> None:
    """Whole decoding steps under Quest, beside plain transformers and dense attention on a cache that appends in
    place. Keys are random there, and come from a forward without attention and feed-forward layers under Quest."""
    base = loaded(folder, "float32", threads)
    about = conditions(base, "float32", threads)
    with torch.inference_mode():
        for length in context:
            what = f"model/{length}/quest, pages of {page}, {share:.0%}"
            if what in read_rows(rows):
                continue
            quest = {"budget": int(share * length), "page": page}
            plain = random_cache(base, length)
            with patched(base, "buffered", length, []):
                buffered = compressed(base, "knorm", plain, length)
            patchattn.patch_model(base, "quest", quest)
            with sketched(base):
                selected, _ = filled(base, length)
            patchattn.unpatch_model(base)
            times: dict[str, list[float]] = {"plain": [], "buffered": [], "quest": []}
            for turn in range(rounds + 1):
                for name, cache in (("plain", plain), ("buffered", buffered), ("quest", selected)):
                    if name == "buffered":
                        with patched(base, name, length, []):
                            spent = seconds(steps(base, cache, tokens))
                    elif name == "quest":
                        patchattn.patch_model(base, "quest", quest)
                        spent = seconds(steps(base, cache, tokens))
                        patchattn.unpatch_model(base)
                    else:
                        spent = seconds(steps(base, cache, tokens))
                    if turn:
                        times[name].append(1e3 * spent / tokens)
            append_row(rows, what, {"ms": times, "density": share, "about": about})
            print(what, {name: f"{statistics.median(each):.1f} ms" for name, each in times.items()}, flush=True)


@app.command()
def page(
    rows: Rows = ROWS,
    markdown: Annotated[Path | None, typer.Option(help="File for the page; printed in any case.")] = None,
) -> None:
    """Write what there is into tables."""
    text = written(read_rows(rows))
    print(text)
    if markdown is not None:
        markdown.write_text(text, encoding="utf-8")


def begin() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def save(rows: Path, key: str, measure: Callable[[], tuple[dict[str, list[float]], float]]) -> None:
    """Measure a row and write it down, unless it is there."""
    if key in read_rows(rows):
        return
    times, density = measure()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, patchattn {patchattn.__version__}"
    shape = f"batch 1, {HEADS} query heads, {KV_HEADS} kv heads of {DIM}, float32, one thread, seed 0"
    about = f"{date.today()}, {platform.machine()}, Python {platform.python_version()}, {versions}; {shape}."
    append_row(rows, key, {"ms": times, "density": density, "about": about})
    print(key, {name: f"{statistics.median(each):.2f} ms" for name, each in times.items()}, flush=True)


if __name__ == "__main__":
    app()
