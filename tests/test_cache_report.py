"""What a kv cache takes up, against sizes written out."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

import patchattn
from patchattn.core.kv_caches import cache_argument, find_cache

from .evictions import HOW
from .families import FAMILIES
from .forgetting import registered

TOKEN = 2 * 8 * 4  # bytes of a float32 key and value of 8 numbers


def prompt(length: int) -> torch.Tensor:
    return torch.randint(3, 60, (3, length), generator=torch.Generator().manual_seed(0))


def test_a_plain_cache_stores_what_it_was_given() -> None:
    model = FAMILIES["llama"].make()
    with torch.no_grad():
        cache = find_cache(model(prompt(9), use_cache=True).values())
    report = patchattn.cache_report(cache)
    assert report.layers == [patchattn.LayerMemory(3 * 2 * 9 * TOKEN, 3 * 2 * 9 * TOKEN)] * 2
    assert report.ratio == 1.0
    assert patchattn.cache_report(DynamicCache()).ratio is None
    static = StaticCache(model.config, max_cache_len=18)
    with torch.no_grad():
        model(prompt(9), **cache_argument(model, static))
    assert patchattn.cache_report(static).ratio == pytest.approx(2.0, abs=0.02)
    with pytest.raises(TypeError, match="expects a kv cache, got list"):
        patchattn.cache_report([])


def test_what_was_dropped_is_not_there() -> None:
    """A slice would keep the whole storage alive."""
    model = patchattn.patch_model(FAMILIES["llama"].make(), "streaming_llm", sinks=2, recent=8, slack=0)
    with torch.no_grad():
        cache = find_cache(model(prompt(200), use_cache=True).values())
    (layer, _) = patchattn.cache_report(cache).layers
    index = 3 * 10 * 4  # an int32 for every key, alike in all heads
    assert layer == patchattn.LayerMemory(3 * 2 * 10 * TOKEN + index, 3 * 2 * 200 * TOKEN)


def test_branches_are_told_apart() -> None:
    """A branch holds keys of its own for every token, also for those that it took from the model by forking; all have
    places to spare, for 256 tokens at most."""
    model = patchattn.patch_model(FAMILIES["llama"].make(), "decore", heads=[(0, 1)])
    made = model.generate(prompt(9), max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    report = patchattn.cache_report(find_cache(made.values()))
    own, most = (3 * 2 * tokens * TOKEN for tokens in (9 + 2, 9 + 2 + 256))
    assert [layer.dense_bytes for layer in report.layers] == [own] * 2
    assert all(own <= layer.stored_bytes <= most for layer in report.layers)
    (branch,) = report.branch_bytes
    assert 2 * own + 2 * 3 * (9 + 2) <= branch <= 2 * most + 2 * 3 * (9 + 2 + 256)  # two bools per token as well
    assert report.stored_bytes == sum(layer.stored_bytes for layer in report.layers) + branch
    assert f"{report.branch_bytes[0]} of them for branches" in repr(report)


def test_heads_apart_count_by_their_own_length() -> None:
    with registered():
        model = patchattn.patch_model(FAMILIES["llama"].make(), "apart", slack=0)
        cache = find_cache(model.generate(prompt(60), max_new_tokens=2, **HOW).values())
    report = patchattn.cache_report(cache)
    assert report.dense_bytes == 2 * 3 * 2 * 61 * TOKEN
    assert report.stored_bytes < 0.7 * report.dense_bytes + 2 * 3 * 256 * TOKEN
