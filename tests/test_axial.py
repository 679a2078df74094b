"""Axial attention (arXiv 1912.12180): rows in some layers, columns in others."""

import pytest

from .grid_masks import Place, assert_sees, made


def numbers(variant: object, shape: tuple[int, int], token: int) -> set[int]:
    (seen,) = variant.sees(*shape)  # type: ignore[attr-defined]
    row, column = divmod(token, shape[1])
    return {y * shape[1] + x for y in seen.rows[row] for x in seen.columns[column]}


def test_rows_and_columns_written_out() -> None:
    assert numbers(made("axial", layer=0), (4, 4), 5) == {4, 5, 6, 7}
    assert numbers(made("axial", layer=1), (4, 4), 5) == {1, 5, 9, 13}
    assert numbers(made("axial", layer=1, axes="rows"), (2, 3), 4) == {3, 4, 5}
    assert numbers(made("axial", layer=0, axes="columns"), (2, 3), 4) == {1, 4}


@pytest.mark.parametrize(("axes", "shape"), [("alternate", (4, 4)), ("rows", (5, 3)), ("columns", (2, 5))])
def test_patches_attend_along_an_axis(monkeypatch: pytest.MonkeyPatch, axes: str, shape: tuple[int, int]) -> None:
    def sees(layer: int, head: int, query: Place, key: Place) -> bool:
        axis = {"alternate": layer, "rows": 0, "columns": 1}[axes]
        return query[axis] == key[axis]

    assert_sees(monkeypatch, "axial", {"axes": axes}, shape, sees)
