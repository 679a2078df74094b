"""AdaKV: how a layer's budget is shared out over its heads, by loops, and which keys those then keep."""

import math
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import patchattn

from .evictions import allocated, extended, fed, kept_by_loops, padded, registered, watched, window_scores
from .families import FAMILIES

SETTINGS = [
    {"budget": 5, "window": 2, "kernel": 1, "floor": 0.0},
    {"budget": 6, "window": 2, "kernel": 3, "floor": 0.2},
    {"budget": 4, "window": 1, "kernel": 1, "floor": 0.5},
    {"compression_ratio": 0.5, "window": 2, "kernel": 3, "floor": 0.3},
    {"budget": 2, "window": 3, "kernel": 1},
]


def shares(scores: list[list[float]], real: list[bool], budget: int, window: int, floor: float) -> list[int]:
    """Of every head; the window among them."""
    places = [place for place, each in enumerate(real) if each]
    outside, even = places[: max(0, len(places) - window)], max(0, budget - window)
    if len(places) <= budget or even == 0:
        return [min(budget, len(places))] * len(scores)
    pairs = [(place, head) for place in outside for head in range(len(scores))]
    taken = sorted(pairs, key=lambda pair: -scores[pair[1]][pair[0]])[: len(scores) * even]
    counts = [sum(head == one for _, one in taken) for head in range(len(scores))]
    return [round((1 - floor) * count + math.floor(floor * even)) + window for count in counts]


def test_the_example_of_two_heads() -> None:
    """Two keys a head on average: the better head takes three of the four."""
    scores = [[0.9, 0.8, 0.7, 0.0], [0.3, 0.2, 0.1, 0.0]]
    assert shares(scores, [True] * 4, 3, 1, 0.0) == [3 + 1, 1 + 1]


@pytest.mark.parametrize("sizes", [[12], [5, 7]])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_heads_keep_their_share_of_the_layer(settings: dict[str, Any], sizes: list[int]) -> None:
    ids, real = padded()
    ids, real = torch.cat([ids, ids.clamp(min=3)[:, :1]], dim=1), extended(real, 13)
    with registered():
        _, layers, cache = watched("adakv", settings, ids, real, [*sizes, 1])
    scores, window, floor = (
        window_scores(layers, real[:, :12], **settings),
        settings["window"],
        settings.get("floor", 0.2),
    )
    kept = [[0, 0, 0] for _ in layers]
    for number, (calls, of_layer) in enumerate(zip(layers, scores, strict=True)):
        for row, length in enumerate(real[:, :12].sum(-1).tolist()):
            budget = settings.get("budget") or math.floor(length * 0.5 + 1e-9)
            of_row = real[row, :12].tolist()
            for head, wanted in enumerate(shares(of_layer[row], of_row, budget, window, floor)):
                expected = kept_by_loops(of_layer[row][head], of_row, wanted, window)
                assert calls[-1]["seen"][row, 2 * head, 0].nonzero()[:, 0].tolist() == [*expected, 12]
                kept[number][row] += len(expected)
    for layer, numbers in zip(cache.layers, kept, strict=True):  # as many places as the fullest row has keys
        if layer.first is not None:
            assert (*layer.first.keys.shape[:2], layer.keys.shape[2]) == (3, max(numbers), 1)
        else:
            assert 15 * layer.stored * 2 < 16 * (max(numbers) + 2)


def test_memory_is_that_of_the_keys_that_are_kept() -> None:
    """Read off the tensors, in a model with a head that attends to all keys alike and one that does to few."""
    model = FAMILIES["llama"].make_exact()
    for layer in model.model.layers:
        with torch.no_grad():
            even, sharp = layer.self_attn.q_proj.weight.chunk(2)
            even.zero_()
            sharp.mul_(50.0)
    patchattn.patch_model(model, "adakv", budget=50, window=8, kernel=1, floor=0.0)
    ids = torch.randint(3, 60, (1, 400), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache()
    fed(model, cache, ids, torch.ones(1, 400, dtype=torch.bool), [397, 1, 1, 1])
    report = patchattn.cache_report(cache)
    token = 2 * cache.layers[0].keys.shape[3] * cache.layers[0].keys.element_size()
    for layer, memory in zip(cache.layers, report.layers, strict=True):
        largest = layer.kept.columns.shape[2]
        assert largest > 1.3 * 50  # so many one rectangle would have, in both heads
        behind = allocated(layer) // token
        columns, counts = 4 * 2 * largest, 8 * 2
        assert memory.stored_bytes == (2 * 50 + behind) * token + columns + counts
        assert memory.dense_bytes == 2 * 400 * token


def test_a_floor_of_one_is_snapkv() -> None:
    ids, real = padded()
    ids, real = torch.cat([ids, ids.clamp(min=3)], dim=1), extended(real, 24)
    settings = {"budget": 6, "window": 2, "kernel": 3}
    found = []
    for name, more in (("snapkv", {}), ("adakv", {"floor": 1.0})):
        model = patchattn.patch_model(FAMILIES["llama"].make_exact(), name, **settings, **more)
        found.append(fed(model, DynamicCache(), ids, real, [12, *[1] * 12])[real])
    assert torch.equal(*found)


def test_a_budget_for_each_head_is_refused() -> None:
    with pytest.raises(ValueError, match="shares the budget of a layer out over its heads"):
        patchattn.patch_model(FAMILIES["llama"].make(), "adakv", budget=[[3, 4], [3, 4]])
