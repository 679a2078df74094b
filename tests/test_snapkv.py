"""SnapKV: scores of the last queries, by loops in float64, and the keys that they leave."""

import math
from typing import Any

import pytest
import torch

import patchattn

from .evictions import extended, kept_by_loops, padded, registered, watched, window_scores
from .families import FAMILIES

SETTINGS = [
    {"budget": 6, "window": 2, "kernel": 3},
    {"budget": 7, "window": 3, "kernel": 5, "pooling": "mean"},
    {"budget": 5, "window": 2, "kernel": 1, "group": "max"},
    {"compression_ratio": 0.3, "window": 2, "kernel": 3, "group": "sum", "pooling": "mean"},
    {"budget": 3, "window": 8, "kernel": 3},
]


@pytest.mark.parametrize("sizes", [[12], [5, 7], [8, 2, 2]])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_keys_that_the_last_queries_attend_to_are_kept(settings: dict[str, Any], sizes: list[int]) -> None:
    ids, real = padded()
    ids, real = torch.cat([ids, ids.clamp(min=3)[:, :1]], dim=1), extended(real, 13)
    with registered():
        _, layers, _ = watched("snapkv", settings, ids, real, [*sizes, 1])
    scores = window_scores(layers, real[:, :12], **settings)
    for calls, of_layer in zip(layers, scores, strict=True):
        for row, length in enumerate(real[:, :12].sum(-1).tolist()):
            wanted = settings.get("budget") or math.floor(length * 0.7 + 1e-9)
            for head in range(2):
                expected = kept_by_loops(of_layer[row][head], real[row, :12].tolist(), wanted, settings["window"])
                for query_head in (2 * head, 2 * head + 1):
                    assert calls[-1]["seen"][row, query_head, 0].nonzero()[:, 0].tolist() == [*expected, 12]


def test_a_second_turn_is_a_prompt_again() -> None:
    """Its last queries choose among all that is stored, which is then cut to the budget."""
    ids, real = torch.randint(3, 60, (1, 24), generator=torch.Generator().manual_seed(4)), torch.ones(1, 24).bool()
    settings = {"budget": 6, "window": 2, "kernel": 1}
    with registered():
        _, layers, cache = watched("snapkv", settings, ids, real, [12, 1, 1, 4, 3, 1, 1, 1])
    for calls, layer in zip(layers, cache.layers, strict=True):
        stored = calls[4]["seen"][0, :, -1]  # the turn's last query sees the six kept, three tokens, and the turn
        assert stored.sum(-1).tolist() == [6 + 2 + 7] * 4
        assert calls[5]["seen"].sum(-1).flatten().tolist() == [6 + 1] * 4
        assert layer.keys.shape[2] == 6 + 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel": 4}, "kernel must be odd"),
        ({"window": 0}, "window must lie between"),
        ({"pooling": "min"}, "pooling must be"),
        ({"event": "call"}, "event must be one of 'prompt', 'chunk'"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        patchattn.patch_model(FAMILIES["llama"].make(), "snapkv", settings)
