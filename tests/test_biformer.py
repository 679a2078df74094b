"""BiFormer's choice of regions (arXiv 2303.08810) against loops over regions and their patches."""

import itertools
from typing import Any

import pytest
import torch

import patchattn

from .grid_masks import attention, image
from .grids import first, make, vit


def chosen(call: Any, shape: tuple[int, int], regions: int, top_k: int, row: int) -> torch.Tensor:
    """`(1, T, T)` bool: what is read of one image, behind a class token."""
    down, across = (side // regions for side in shape)
    members = [
        [1 + y * shape[1] + x for y in range(i * down, (i + 1) * down) for x in range(j * across, (j + 1) * across)]
        for i, j in itertools.product(range(regions), range(regions))
    ]
    means = [
        [states[row, :, tokens].double().mean(1).flatten() for tokens in members] for states in (call.query, call.key)
    ]
    count = 1 + shape[0] * shape[1]
    keep = torch.zeros(1, count, count, dtype=torch.bool)
    keep[:, 0] = keep[:, :, 0] = True
    for one, query in enumerate(means[0]):
        best = sorted(range(len(members)), key=lambda other: -float(query @ means[1][other]))[:top_k]
        for token in members[one]:
            for other in best:
                keep[0, token, members[other]] = True
    return keep


@pytest.mark.parametrize(("shape", "regions", "top_k"), [((4, 4), 2, 1), ((4, 6), 2, 3), ((6, 3), 3, 4)])
def test_regions_read_those_that_match(shape: tuple[int, int], regions: int, top_k: int) -> None:
    model, calls = patchattn.patch_model(make(vit), "biformer", regions=regions, top_k=top_k), []
    with torch.no_grad(), patchattn.probed(model, lambda call, output: calls.append((call, output))):
        model(**image(*shape))
    own = []
    for call, output in calls:
        for row in range(2):
            keep = chosen(call, shape, regions, top_k, row)
            own.append(keep)
            states = (tensor[row : row + 1] for tensor in (call.query, call.key, call.value))
            expected = attention(*states, call.scaling, keep)[0]
            torch.testing.assert_close(output[row].double(), expected, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(own[0], keep) for keep in own[1:])  # images and layers choose for themselves


@torch.no_grad()
def test_all_regions_are_the_model() -> None:
    model = make(vit)
    plain = first(model, image(4, 4))
    with patchattn.patched(model, "biformer", regions=2, top_k=4):
        assert torch.equal(first(model, image(4, 4)), plain)


def test_regions_that_do_not_divide_are_refused_with_those_that_do() -> None:
    model = patchattn.patch_model(make(vit), "biformer")
    with pytest.raises(ValueError, match=r"7 x 7 regions do not divide the 4 x 6 patches .* Sizes that fit: 1, 2\."):
        model(**image(4, 6))
    with pytest.raises(ValueError, match="top_k must be at most the 4 regions of an image, got 5"):
        patchattn.patch_model(make(vit), "biformer", regions=2, top_k=5)
