"""PyramidKV: how many keys each layer keeps, by its formula, and that they are the best by SnapKV's scores."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import patchattn
from patchattn.core.kv_caches import cache_argument
from patchattn.variants.eviction.pyramidkv import PyramidKV, PyramidKVConfig

from .evictions import extended, kept_by_loops, padded, registered, watched, window_scores
from .families import FAMILIES


def kept_in_layer(layer: int, layers: int, budget: int, length: int, window: int, beta: int) -> int:
    """By the released code, for one prompt; without what divides by zero there."""
    if length < budget:
        return length
    shared = budget - window
    if shared <= 0 or length < 2 * shared or layers == 1:
        return budget
    least = shared // beta
    most = 2 * shared - least
    if most >= length - window:
        most = length - window
        least = 2 * shared - most
    return most - layer * ((most - least) // (layers - 1)) + window


def variant(layer: int, layers: int, **settings: Any) -> PyramidKV:
    site = patchattn.find_sites(FAMILIES["llama"].make())[0]
    return PyramidKV(PyramidKVConfig(**settings), replace(site, layer_index=layer, layer_count=layers))


def test_the_example_of_four_layers() -> None:
    counts = [
        int(variant(layer, 4, budget=132, window=32)._counts(torch.tensor(132), torch.tensor(1000))) - 32
        for layer in range(4)
    ]
    assert counts == [195, 132, 69, 6]


@pytest.mark.parametrize("layers", [1, 2, 3, 7])
def test_sizes_are_those_of_the_released_code(layers: int) -> None:
    for layer in range(layers):
        for budget, window, beta in ((20, 4, 20), (12, 3, 2), (5, 8, 3), (9, 1, 1)):
            one = variant(layer, layers, budget=budget, window=window, beta=beta)
            lengths = [length for length in range(1, 90) if length > budget]
            found = one._counts(torch.tensor(budget), torch.tensor(lengths)).tolist()
            expected = [kept_in_layer(layer, layers, budget, length, window, beta) for length in lengths]
            assert found == expected


@pytest.mark.parametrize(
    "settings",
    [{"budget": 5, "window": 2, "kernel": 3, "beta": 3}, {"compression_ratio": 0.6, "window": 2, "kernel": 1}],
)
def test_the_best_by_the_scores_of_the_window_are_kept(settings: dict[str, Any]) -> None:
    ids, real = padded()
    ids, real = torch.cat([ids, ids.clamp(min=3)[:, :1]], dim=1), extended(real, 13)
    with registered():
        _, layers, _ = watched("pyramidkv", settings, ids, real, [7, 5, 1])
    scores = window_scores(layers, real[:, :12], **settings)
    sizes = []
    for number, (calls, of_layer) in enumerate(zip(layers, scores, strict=True)):
        for row, length in enumerate(real[:, :12].sum(-1).tolist()):
            budget = settings.get("budget") or math.floor(length * 0.4 + 1e-9)
            wanted = kept_in_layer(number, 2, budget, length, 2, settings.get("beta", 20))
            sizes.append(wanted)
            for head in range(2):
                expected = kept_by_loops(of_layer[row][head], real[row, :12].tolist(), wanted, 2)
                assert calls[-1]["seen"][row, 2 * head, 0].nonzero()[:, 0].tolist() == [*expected, 12]
    assert len(set(sizes)) > 1


@pytest.mark.parametrize("waits", [False, True], ids=["cpu", "others"])
def test_every_layer_stores_what_it_keeps_and_no_more(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchattn.cache.waiting.waits", lambda tensor: waits)
    model = patchattn.patch_model(FAMILIES["llama"].make(), "pyramidkv", budget=16, window=4, beta=4)
    cache = DynamicCache()
    with torch.no_grad():
        for size in (60, 1):
            model(torch.full((1, size), 7), **cache_argument(model, cache))
    sizes = [kept_in_layer(layer, 2, 16, 60, 4, 4) for layer in range(2)]
    assert sizes == [25, 7]
    assert [layer.keys.shape[2] for layer in cache.layers] == [size + 1 for size in sizes]


def test_one_budget_is_shared_out() -> None:
    with pytest.raises(ValueError, match="shares one budget out over the layers"):
        patchattn.patch_model(FAMILIES["llama"].make(), "pyramidkv", budget=[10, 10])
