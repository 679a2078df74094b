"""AdaKV: how a layer's budget is shared out over its heads, by loops, and which keys those then keep."""

import math
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import patchattn

from .evictions import extended, fed, kept_by_loops, padded, registered, watched, window_scores
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
    most = [0, 0]
    for number, (calls, of_layer) in enumerate(zip(layers, scores, strict=True)):
        for row, length in enumerate(real[:, :12].sum(-1).tolist()):
            budget = settings.get("budget") or math.floor(length * 0.5 + 1e-9)
            of_row = real[row, :12].tolist()
            for head, wanted in enumerate(shares(of_layer[row], of_row, budget, window, floor)):
                expected = kept_by_loops(of_layer[row][head], of_row, wanted, window)
                assert calls[-1]["seen"][row, 2 * head, 0].nonzero()[:, 0].tolist() == [*expected, 12]
                most[number] = max(most[number], len(expected))
    for layer, number in zip(cache.layers, most, strict=True):  # one rectangle, down to the largest head
        assert layer.keys.shape[2] == number + 1


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
