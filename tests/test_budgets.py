"""Budgets of caches that forget, and which keys are the best."""

from typing import Any

import pytest
import torch

import patchattn
from patchattn.reading.budgets import best, share

from .evictions import kept_by_loops
from .families import FAMILIES


def test_the_best_are_those_of_a_stable_sort() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(40):
        batch, heads, keys, last = (int(torch.randint(1, high, (), generator=draw)) for high in (4, 4, 14, 5))
        scores = torch.randint(-2, 3, (batch, heads, keys), generator=draw).double()  # full of ties
        real = torch.rand(batch, 1, keys, generator=draw) < 0.7
        counts = torch.randint(1, 9, (batch, heads, 1), generator=draw)
        found = best(scores, real, counts, last)
        for row in range(batch):
            for head in range(heads):
                one = scores[row, head].tolist(), real[row, 0].tolist(), int(counts[row, head])
                assert found[row, head].nonzero()[:, 0].tolist() == kept_by_loops(*one, last)


def test_scores_that_are_no_numbers_one_could_beat_come_before_padding() -> None:
    scores = torch.tensor([[[-torch.inf, 1.0, -torch.inf, 2.0]]])
    real = torch.tensor([[[False, True, True, True]]])
    assert best(scores, real, torch.full((1, 1, 1), 3)).tolist() == [[[False, True, True, True]]]


@pytest.mark.parametrize(
    ("columns", "ratio", "kept"), [(10, 0.9, 1), (10, 0.5, 5), (7, 0.5, 3), (3, 0.7, 0), (9, 0, 9)]
)
def test_a_ratio_rounds_down_but_not_by_floating_point(columns: int, ratio: float, kept: int) -> None:
    assert share(columns, ratio) == kept


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"budget": 5, "compression_ratio": 0.5}, ValueError, "Give budget .* or compression_ratio"),
        ({"compression_ratio": 1.0}, ValueError, "compression_ratio must be less than 1"),
        ({"compression_ratio": -0.1}, ValueError, "compression_ratio must lie between"),
        ({"budget": 0}, ValueError, "budget must lie between"),
        ({"budget": []}, ValueError, "budget must be at least 1 in every layer"),
        ({"budget": [5, [0, 3]]}, ValueError, "budget must be at least 1 in every layer"),
        ({"budget": [5]}, ValueError, "budget is given for 1 layers, and model.layers.0.self_attn is one of 2"),
        (
            {"budget": [5, [4, 7], 3]},
            ValueError,
            "budget is given for 3 layers, and model.layers.0.self_attn is one of",
        ),
        ({"budget": [5, [1, 2, 3]]}, ValueError, "has 2 kv heads, but budgets for 3"),
        ({"budget": 0.5}, TypeError, "budget must be"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(settings: dict[str, Any], error: Any, message: str) -> None:
    model = FAMILIES["llama"].make()
    with pytest.raises(error, match=message):
        patchattn.patch_model(model, "knorm", settings)
    assert not patchattn.patch_info(model).patches
