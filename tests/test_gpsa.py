"""Gated positional self-attention (ConViT, arXiv 2103.10697) against loops over pairs of patches."""

import math

import pytest
import torch

import patchattn
from patchattn.softmax import rows

from .behaviour import variants_in
from .grid_masks import image, made
from .grids import first, make, vit

HEADS = {"hidden_size": 40, "num_attention_heads": 5}


def test_heads_begin_beside_each_other() -> None:
    """Of nine heads each looks at another place around a patch; of four at corners; those that are left are random."""
    nine = made("gpsa", heads=9).position.detach()
    assert {(float(x) / 2, float(y) / 2) for x, y, _ in nine} == {(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)}
    assert bool((nine[:, 2] == -1).all())
    assert nine[1].tolist() == [-2, 0, -1]
    five = made("gpsa", heads=5, strength=3.0).position.detach()
    assert five[:4].tolist() == [[-3, -3, -3], [-3, 3, -3], [3, -3, -3], [3, 3, -3]]
    assert float(five[4].abs().max()) <= 1 / math.sqrt(3)
    assert made("gpsa", heads=4).gate.tolist() == [1.0] * 4


@pytest.mark.parametrize("entries", [2**24, 200])
def test_it_is_a_mixture_of_content_and_place(monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    monkeypatch.setattr(rows, "_ENTRIES", entries)
    model, calls = patchattn.patch_model(make(lambda: vit(**HEADS)), "gpsa"), []
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for variant in variants_in(model):
            for parameter in variant.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    with torch.no_grad(), patchattn.probed(model, lambda call, output: calls.append((call, output))):
        model(**image(3, 4))
    places = [(y, x) for y in range(3) for x in range(4)]
    for (call, output), variant in zip(calls, variants_in(model), strict=True):
        gate, position = variant.gate.detach().double(), variant.position.detach().double()
        query, key, value = (states.double() for states in (call.query, call.key, call.value))
        for head in range(5):
            weights = (query[:, head] @ key[:, head].mT * call.scaling).softmax(-1)
            share = 1 / (1 + math.exp(-float(gate[head])))
            for i, (y, x) in enumerate(places):
                to = [(u - x, v - y) for v, u in places]
                logits = torch.tensor([[a, b, a * a + b * b] for a, b in to]).double() @ position[head]
                weights[:, 1 + i] *= 1 - share
                weights[:, 1 + i, 1:] += share * logits.softmax(-1)
            expected = weights @ value[:, head]
            torch.testing.assert_close(output[:, :, head].double(), expected, rtol=1e-4, atol=1e-5)


def test_closed_gates_are_nearly_the_model() -> None:
    model = make(vit)
    with torch.no_grad():
        plain = first(model, image(3, 4))
        with patchattn.patched(model, "gpsa", gate=-20.0):
            torch.testing.assert_close(first(model, image(3, 4)), plain)
