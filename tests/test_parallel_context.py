"""A choice of pieces, against masses written out in float64; what it shares with APE is in `test_ape.py`."""

from typing import Any

import numpy as np
import pytest
import torch

import patchattn

from .reference import DIM, HEADS, KV_HEADS, layer_in_and_out, rotate, tiny_llama
from .test_ape import IDS, PIECES, PLACES, REST, SPANS, sees


def by_loops(module: Any, inputs: np.ndarray, top: int) -> np.ndarray:
    """Output `(T, E)` of a layer for one sequence `(T, E)`, of which rows that follow read the best pieces alone."""
    weights = {name: getattr(module, f"{name}_proj").weight.detach().numpy() for name in "qkvo"}
    queries, keys, values = ((inputs @ weights[name].T).reshape(len(inputs), -1, DIM) for name in "qkv")
    groups = HEADS // KV_HEADS
    rows = []
    for row in range(len(inputs)):
        exponentials = np.zeros((HEADS, len(inputs)))
        for head, key in np.ndindex(HEADS, len(inputs)):
            if sees(row, key):
                turned = rotate(queries[row, head], PLACES[row] - PLACES[key])
                exponentials[head, key] = np.exp(turned @ keys[key, head // groups] / DIM**0.5)
        if row >= REST:
            shares = (exponentials / exponentials.sum(1, keepdims=True)).mean(0)
            masses = [shares[start:end].sum() for start, end in PIECES]
            for worst in np.argsort(masses)[: len(PIECES) - top]:
                exponentials[:, slice(*PIECES[worst])] = 0
        shares = exponentials / exponentials.sum(1, keepdims=True)
        heads = [shares[head] @ values[:, head // groups] for head in range(HEADS)]
        rows.append(weights["o"] @ np.concatenate(heads))
    return np.stack(rows)


@pytest.mark.parametrize("top", [1, 2, 3])
def test_the_best_pieces(top: int) -> None:
    model = patchattn.patch_model(tiny_llama(), "parallel_context", spans=SPANS, top=top)
    inputs, found = layer_in_and_out(model, IDS[None] % 50)
    expected = by_loops(model.model.layers[0].self_attn, inputs[0], top)
    np.testing.assert_allclose(found[0], expected, atol=2e-6)  # the model's angles are float32
    everything = by_loops(model.model.layers[0].self_attn, inputs[0], len(PIECES))
    assert (np.abs(everything - expected).max() > 1e-3) == (top < 3)


def test_one_of_two_equal_pieces_is_read() -> None:
    ids = torch.tensor([[3, 7, 9, 7, 9, 12]])
    spans = [["prefix", 0, 1], ["document", 1, 3], ["document", 3, 5]]
    model = patchattn.patch_model(tiny_llama(), "parallel_context", spans=spans, top=1)
    with torch.no_grad():
        found = model(ids).logits[0, -1]
        patchattn.unpatch_model(model)
        expected = model(ids[:, [0, 1, 2, 5]]).logits[0, -1]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
