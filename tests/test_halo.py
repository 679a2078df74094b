"""Halo attention (HaloNet, arXiv 2103.12731): blocks that see a rim around them."""

import pytest

from .grid_masks import Place, assert_sees, made, spelt


@pytest.mark.parametrize(
    ("size", "settings", "written"),
    [
        (4, {"block": 2, "halo": 1}, "012 012 123 123"),
        (5, {"block": 2, "halo": 1}, "012 012 1234 1234 34"),
        (6, {"block": 3, "halo": 0}, "012 012 012 345 345 345"),
        (3, {"block": 8, "halo": 3}, "012 012 012"),
    ],
)
def test_blocks_written_out(size: int, settings: dict[str, int], written: str) -> None:
    (seen,) = made("halo", **settings).sees(size, size)
    assert spelt(seen.rows) == spelt(seen.columns) == written


def test_without_a_rim_it_is_windows() -> None:
    assert made("halo", block=3, halo=0).sees(7, 8) == made("window", size=3, shifted="none").sees(7, 8)


@pytest.mark.parametrize(("shape", "block", "halo"), [((4, 4), 2, 1), ((5, 7), 3, 1), ((5, 4), 1, 2)])
def test_blocks_attend_to_themselves_and_a_rim(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], block: int, halo: int
) -> None:
    def sees(layer: int, head: int, query: Place, key: Place) -> bool:
        """A key is at most `halo` away from some patch of the query's block."""
        return all(
            any(abs(k - other) <= halo for other in range(100) if other // block == q // block)
            for q, k in zip(query, key, strict=True)
        )

    assert_sees(monkeypatch, "halo", {"block": block, "halo": halo}, shape, sees)
