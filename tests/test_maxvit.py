"""MaxViT's windows and lattices (arXiv 2204.01697)."""

import pytest
import torch

import patchattn

from .grid_masks import Place, assert_sees, image, made
from .grids import first, make, vit


def numbers(layer: int, shape: tuple[int, int], size: int, token: int) -> set[int]:
    (seen,) = made("maxvit", layer, size=size).sees(*shape)
    row, column = divmod(token, shape[1])
    return {y * shape[1] + x for y in seen.rows[row] for x in seen.columns[column]}


def test_windows_and_lattices_written_out() -> None:
    assert numbers(0, (4, 4), 2, 0) == {0, 1, 4, 5}
    assert numbers(1, (4, 4), 2, 0) == {0, 2, 8, 10}
    assert numbers(1, (4, 6), 2, 1) == {1, 4, 13, 16}


@pytest.mark.parametrize(
    ("pattern", "shape", "size"), [("alternate", (4, 4), 2), ("block", (3, 6), 3), ("grid", (6, 3), 3)]
)
def test_patches_attend_within_windows_or_lattices(
    monkeypatch: pytest.MonkeyPatch, pattern: str, shape: tuple[int, int], size: int
) -> None:
    def sees(layer: int, head: int, query: Place, key: Place) -> bool:
        is_lattice = {"alternate": layer == 1, "block": False, "grid": True}[pattern]
        sides = zip(query, key, shape, strict=True)
        if is_lattice:
            return all((q - k) % (n // size) == 0 for q, k, n in sides)
        return all(q // size == k // size for q, k, _ in sides)

    assert_sees(monkeypatch, "maxvit", {"size": size, "pattern": pattern}, shape, sees)


@torch.no_grad()
def test_a_window_and_a_lattice_as_large_as_the_image_are_the_model() -> None:
    model = make(vit)
    plain = first(model, image(4, 4))
    with patchattn.patched(model, "maxvit", size=4):
        assert torch.equal(first(model, image(4, 4)), plain)


def test_a_size_that_does_not_divide_is_refused_with_those_that_do() -> None:
    model = patchattn.patch_model(make(vit), "maxvit", size=4)
    with pytest.raises(ValueError, match=r"4 x 4 do not divide the 6 x 12 patches .* Sizes that fit: 1, 2, 3, 6\."):
        model(**image(6, 12))
