"""The gallery's pictures: what they show is what masks say, and what changes nothing has none."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gallery

import patchattn


def test_influence_is_where_masks_let_tokens_through() -> None:
    length = gallery.PROMPT + gallery.STEPS
    row, column = np.indices((length, length))
    dense, _ = gallery.measured(None, "a decoder", 1)
    rounding = gallery.ROUNDING * dense.max()
    np.testing.assert_array_equal(dense > rounding, column <= row)
    settings = patchattn.variant_info("streaming").examples[0]
    found, was_moved = gallery.measured("streaming", "a decoder", 1)
    is_read = (column <= row) & ((column < settings["sinks"]) | (row - column < settings["recent"]))
    np.testing.assert_array_equal(found > rounding, is_read)
    assert not was_moved


def test_parameters_that_change_nothing_at_their_start_are_moved() -> None:
    found, was_moved = gallery.measured("talking_heads", "a decoder", 1)
    assert was_moved
    assert np.isfinite(found).all()


def test_what_does_not_show_has_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "groups", lambda: {"Some": ["cad", "knorm"]})
    gallery.main(tmp_path)
    assert sorted(path.stem for path in (tmp_path / "gallery").iterdir()) == ["dense", "dense_tower", "knorm"]
    text = (tmp_path / "gallery.md").read_text()
    assert "|  | [`cad`](variants/cad.md)" in text
    assert "| ![knorm](gallery/knorm.png) | [`knorm`](variants/knorm.md)" in text


def test_groups_are_those_of_the_readme() -> None:
    named = [name for names in gallery.groups().values() for name in names]
    assert sorted(named) == sorted(patchattn.list_variants())
