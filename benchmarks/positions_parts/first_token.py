"""Time to the first token: of a whole prompt, and of what stands behind pieces whose keys and values are stored."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from patchattn.core.kv_caches import cache_argument
from patchattn.positions.marking import mark_segments

from .common import Setup, patched, table
from .documents import segments
from .prompts import one_hop

SETTINGS = {"plain": {}, "parallel_context": {"parallel_context": {}}, "ape": {"ape": {}}}
SETTINGS["block_attention"] = {"block_attention": {}}


NAME = "first_token"


@torch.inference_mode()
def measure(setup: Setup, counts: tuple[int, ...], repeats: int) -> None:
    """Rows of medians of processor time in ms, settings in turn; one round more warms up."""
    model, tokenizer = setup.smol
    for count in counts:
        marked = mark_segments(tokenizer, segments(one_hop(count, 0)), add_special_tokens=False)
        ids, end = torch.tensor([marked.input_ids]), marked.spans[-1].end
        spans = [list(span) for span in marked.spans]
        for name, variants in SETTINGS.items():
            with patched(model, {variant: {"spans": spans} for variant in variants}):
                cache = DynamicCache(config=model.config)
                model(ids[:, :end], logits_to_keep=1, **cache_argument(model, cache))

                def behind(cache: DynamicCache = cache, ids: Any = ids, end: int = end) -> None:
                    model(ids[:, end:], logits_to_keep=1, **cache_argument(model, cache))
                    cache.crop(end - ids.shape[1])

                def whole(ids: Any = ids) -> None:
                    model(ids, logits_to_keep=1, use_cache=False)

                times = {"whole": round(_median(whole, repeats)), "behind": round(_median(behind, repeats))}
            tokens = {"tokens": ids.shape[1], "behind_them": ids.shape[1] - end}
            setup.write(NAME, f"{count}/{name}", {**tokens, **times})


def section(setup: Setup) -> list[str]:
    """The latest time of every setting."""
    rows = setup.rows(NAME)
    if not rows:
        return []
    cells = []
    for key, row in rows.items():
        count, name = key.split("/")
        cells.append([name, count, *(f"{row[part]}" for part in ("tokens", "behind_them", "whole", "behind"))])
    return [
        "## Time to the first token",
        "",
        "`python benchmarks/positions.py first-token DIR --folder ROWS`: ms of one thread's processor time on an idle "
        "machine, medians, of all of a prompt, and of what stands behind documents whose keys and values are stored.",
        "",
        *table(["", "documents", "tokens", "behind them", "whole, ms", "documents stored, ms"], cells),
    ]


def _median(run: Callable[[], None], repeats: int) -> float:
    times = []
    for number in range(repeats + 1):
        start = time.process_time()
        run()
        if number:
            times.append(1e3 * (time.process_time() - start))
    return statistics.median(times)
