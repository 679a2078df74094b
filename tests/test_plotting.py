"""Pictures of the use of heads."""

import subprocess
import sys

import pytest

from patchattn.plotting import plot_head_usage


def test_a_picture_of_every_layer_and_head(tmp_path):
    figure = plot_head_usage([[1.0, 0.5, 0.0], [1.0, 0.25, 0.75]], title="Use")
    axes, bar = figure.axes
    assert axes.get_title() == "Use"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("query head", "layer")
    assert "%" in bar.get_ylabel()
    assert [text.get_text() for text in axes.texts] == ["100", "50", "0", "100", "25", "75"]
    figure.savefig(tmp_path / "use.png")
    assert (tmp_path / "use.png").read_bytes().startswith(b"\x89PNG")


def test_layers_may_differ_in_their_heads():
    axes = plot_head_usage([[1.0], [1.0, 0.5, 0.2]]).axes[0]
    assert axes.images[0].get_array().shape == (2, 3)
    assert len(axes.texts) == 4


def test_numbers_are_left_out_of_a_large_picture():
    assert not plot_head_usage([[0.5] * 32] * 32).axes[0].texts


@pytest.mark.parametrize("usage", [[], [[]], [[1.0], []], [[1.5]], [[float("nan")]]])
def test_what_cannot_be_drawn_is_refused(usage):
    with pytest.raises(ValueError, match="usage"):
        plot_head_usage(usage)


def test_matplotlib_is_imported_only_to_draw():
    code = "import sys, patchattn.plotting; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
