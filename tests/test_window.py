"""Windows of an image (Swin, arXiv 2103.14030) against the rolled windows and regions that the paper describes."""

import itertools

import pytest
import torch

import patchattn

from .grid_masks import assert_sees, image, made, spelt
from .grids import first, make, vit


@pytest.mark.parametrize(
    ("shape", "size", "layer", "written"),
    [
        ((4, 4), 2, 0, ["01 01 23 23"] * 2),
        ((4, 4), 2, 1, ["0 12 12 3"] * 2),
        ((5, 5), 2, 0, ["01 01 23 23 4"] * 2),
        ((5, 6), 3, 1, ["0 123 123 123 4", "0 123 123 123 45 45"]),
        ((4, 7), 4, 1, ["0123 0123 0123 0123", "0123 0123 0123 0123 456 456 456"]),  # as large as a side: none shifted
        ((3, 5), 9, 0, ["012 012 012", "012 012 012 34 34"]),  # larger than a side: as large as it
    ],
)
def test_windows_written_out(shape: tuple[int, int], size: int, layer: int, written: list[str]) -> None:
    (seen,) = made("window", layer, size=size).sees(*shape)
    assert [spelt(seen.rows), spelt(seen.columns)] == written


def regions(rows: int, columns: int, size: int, shift: int) -> torch.Tensor:
    """`(N, N)` bool the paper's way: the map is rolled and cut into windows, where other regions are masked."""
    number = torch.zeros(rows, columns, dtype=torch.long)
    cuts = [(slice(0, -size), slice(-size, -shift), slice(-shift, None))] * 2
    for count, (y, x) in enumerate(itertools.product(*cuts)):
        number[y, x] = count
    places = torch.arange(rows * columns).view(rows, columns).roll((-shift, -shift), (0, 1))
    seen = torch.zeros(rows * columns, rows * columns, dtype=torch.bool)
    for y in range(0, rows, size):
        for x in range(0, columns, size):
            window = places[y : y + size, x : x + size].flatten()
            region = number[y : y + size, x : x + size].flatten()
            seen[window[:, None], window] = region[:, None] == region
    return seen


@pytest.mark.parametrize(("shape", "size"), [((4, 4), 2), ((6, 9), 3), ((8, 12), 4), ((14, 14), 7)])
def test_a_rolled_map_with_masked_regions_sees_the_same(shape: tuple[int, int], size: int) -> None:
    (seen,) = made("window", 1, size=size).sees(*shape)
    found = torch.zeros(*shape, *shape, dtype=torch.bool)
    for y, x in itertools.product(*map(range, shape)):
        for j, i in itertools.product(seen.rows[y], seen.columns[x]):
            found[y, x, j, i] = True
    assert torch.equal(found.flatten(2).flatten(0, 1), regions(*shape, size, size // 2))


@pytest.mark.parametrize(("shape", "size", "shifted"), [((4, 4), 2, "odd"), ((5, 3), 2, "all"), ((5, 5), 3, "none")])
def test_patches_attend_within_their_window(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], size: int, shifted: str
) -> None:
    def sees(layer: int, head: int, query: tuple[int, int], key: tuple[int, int]) -> bool:
        moves = shifted == "all" or (shifted == "odd" and layer == 1)
        start = size // 2 if moves else 0
        return all((q - start) // size == (k - start) // size for q, k in zip(query, key, strict=True))

    assert_sees(monkeypatch, "window", {"size": size, "shifted": shifted}, shape, sees)


@torch.no_grad()
def test_a_window_as_large_as_the_image_is_the_model() -> None:
    model = make(vit)
    plain = first(model, image(4, 4))
    for size in (4, 9):
        with patchattn.patched(model, "window", size=size):
            assert torch.equal(first(model, image(4, 4)), plain)
