"""Windows over heads and layers (MSWA, arXiv 2501.01039) against loops."""

import pytest
import torch

import patchattn

from .families import FAMILIES
from .reference import tiny_llama
from .selecting import assert_reads, recorded

TOKENS = torch.arange(3, 23)[None]


@pytest.mark.parametrize(
    ("settings", "windows"),
    [
        ({"by_layer": False}, [4, 8, 16, 32]),
        ({}, [1, 2, 4, 8]),  # the first of four groups of layers
        ({"by_layer": False, "by_head": False}, [16] * 4),
        ({"by_head": False}, [4] * 4),
    ],
)
def test_windows_of_heads(settings: dict[str, bool], windows: list[int]) -> None:
    model = patchattn.patch_model(tiny_llama(), "mswa", window=16, **settings)
    assert_reads(model, TOKENS, lambda head, i, j: i - j < windows[head])


def test_windows_grow_with_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny_llama(num_hidden_layers=8), recorded(monkeypatch)
    patchattn.patch_model(model, "mswa", window=16)
    with torch.no_grad():
        model(TOKENS)
    largest = [[int(seen[0, head].sum(-1).max()) for head in range(4)] for _, seen, _ in calls]
    wanted = []
    for layer in range(8):
        base = 16 * 2.0 ** (layer // 2 - 2)
        wanted.append([min(20, int(base * 2.0 ** (head - 2))) for head in range(4)])
    assert largest == wanted


def test_a_window_that_cannot_be_scaled_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        patchattn.patch_model(tiny_llama(), "mswa", window=24)
    with pytest.raises(NotImplementedError, match="does not support bidirectional or cross"):
        patchattn.patch_model(FAMILIES["vit"].make(), "mswa")
