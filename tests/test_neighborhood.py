"""Neighbourhoods of patches (NAT, arXiv 2204.07143; DiNAT, 2209.15001): sets written out, and the nearest patches."""

import pytest
import torch

import patchattn

from .grid_masks import Place, assert_sees, image, made, spelt
from .grids import first, make, vit


@pytest.mark.parametrize(
    ("size", "settings", "written"),
    [
        (5, {"kernel": 3}, "012 012 123 234 234"),
        (4, {"kernel": 2}, "01 01 12 23"),
        (6, {"kernel": 3, "dilation": 2}, "024 135 024 135 024 135"),
        (7, {"kernel": 3, "dilation": 2}, "024 135 024 135 246 135 246"),
        (6, {"kernel": 3, "stride": 2}, "012 012 234 234 345 345"),
        (6, {"kernel": 3, "stride": 3}, "012 012 012 345 345 345"),
        (8, {"kernel": 3, "stride": 3}, "012 012 012 345 345 345 567 567"),
    ],
)
def test_neighbourhoods_written_out(size: int, settings: dict[str, int], written: str) -> None:
    (seen,) = made("neighborhood", **settings).sees(size, size)
    assert spelt(seen.rows) == spelt(seen.columns) == written


def nearest(place: int, size: int, kernel: int, dilation: int = 1) -> set[int]:
    """Of the positions that are whole dilations away, the nearest; of an even number one more before than behind."""
    others = sorted(range(place % dilation, size, dilation), key=lambda other: abs(other - place + 0.1))
    return set(others[:kernel])


@pytest.mark.parametrize(("kernel", "dilation"), [(2, 1), (3, 1), (4, 1), (7, 1), (3, 2), (2, 3), (4, 3)])
def test_they_are_the_nearest(kernel: int, dilation: int) -> None:
    for rows in range(kernel * dilation, 16):
        (seen,) = made("neighborhood", kernel=kernel, dilation=dilation).sees(rows, 15)
        for sets in (seen.rows, seen.columns):
            assert [set(keys) for keys in sets] == [nearest(q, len(sets), kernel, dilation) for q in range(len(sets))]


@pytest.mark.parametrize(
    ("shape", "kernel", "dilation"),
    [((4, 4), 3, 1), ((5, 5), 2, 1), ((5, 7), 3, 1), ((6, 7), 3, 2)],
)
def test_patches_attend_to_their_neighbourhood(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], kernel: int, dilation: int
) -> None:
    def sees(layer: int, head: int, query: Place, key: Place) -> bool:
        return all(k in nearest(q, n, kernel, dilation) for q, k, n in zip(query, key, shape, strict=True))

    assert_sees(monkeypatch, "neighborhood", {"kernel": kernel, "dilation": dilation}, shape, sees)


@pytest.mark.parametrize("several", ["layers", "heads"])
def test_several_kernels_are_for_layers_or_for_heads(monkeypatch: pytest.MonkeyPatch, several: str) -> None:
    """Of five heads the first two have the first kernel, and the last three the second."""
    kinds = [(3, 1), (2, 2)]

    def sees(layer: int, head: int, query: Place, key: Place) -> bool:
        kind = kinds[layer if several == "layers" else head >= 2]
        return all(k in nearest(q, 4, *kind) for q, k in zip(query, key, strict=True))

    settings = {"kernel": [3, 2], "dilation": [1, 2], "several": several}
    assert_sees(
        monkeypatch,
        "neighborhood",
        settings,
        (4, 4),
        sees,
        how=lambda: vit(hidden_size=40, num_attention_heads=5),
    )


@torch.no_grad()
def test_a_kernel_as_large_as_the_image_is_the_model() -> None:
    model = make(vit)
    plain = first(model, image(3, 3))
    with patchattn.patched(model, "neighborhood", kernel=3):
        assert torch.equal(first(model, image(3, 3)), plain)


def test_an_image_that_is_too_small_is_refused_with_its_size() -> None:
    model = patchattn.patch_model(make(vit), "neighborhood", kernel=3, dilation=2)
    with pytest.raises(ValueError, match=r"every 2, needs 6 rows and columns, .* image of 5 x 7: .* at most 5"):
        model(**image(5, 7))
    assert model(**image(6, 7)) is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel": 1}, "kernel must lie between 2"),
        ({"kernel": 3, "stride": 4}, "stride must be at most the kernel, got 4 and 3"),
        ({"kernel": [3, 5], "dilation": [1, 2, 3]}, "as many of either as of the other, got 2 and 3"),
        ({"kernel": [3, 5, 7], "several": "heads"}, "are more than the 2 heads"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patchattn.patch_model(make(vit), "neighborhood", settings)
