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


@torch.inference_mode()
def first_token(setup: Setup, counts: tuple[int, ...], repeats: int) -> list[str]:
    """Lines of a table: medians of processor time in ms, settings in turn; one round more warms up."""
    model, tokenizer = setup.smol
    cells = []
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

                times = [_median(whole, repeats), _median(behind, repeats)]
            sizes = [f"{count}", f"{ids.shape[1]}", f"{ids.shape[1] - end}"]
            cells.append([name, *sizes, *(f"{each:.0f}" for each in times)])
    return table(["", "documents", "tokens", "behind them", "whole, ms", "pieces stored, ms"], cells)


def _median(run: Callable[[], None], repeats: int) -> float:
    times = []
    for number in range(repeats + 1):
        start = time.process_time()
        run()
        if number:
            times.append(1e3 * (time.process_time() - start))
    return statistics.median(times)
