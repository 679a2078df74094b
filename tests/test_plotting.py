"""Pictures of the use of heads."""

import subprocess
import sys

import pytest

from patchattn.core.heads import BaseFacts
from patchattn.core.host import find_sites
from patchattn.core.importance import HeadImportance, SiteScores
from patchattn.inspection.temperatures import LayerTemperatures, Spread
from patchattn.plotting import plot_head_importance, plot_head_usage, plot_temperatures

from .families import FAMILIES


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


def test_a_picture_of_importance(tmp_path):
    scores = {
        "encoder.layers.0.attn": SiteScores(0, 2, (0.1, 0.9)),
        "encoder.layers.1.attn": SiteScores(1, 2, (0.3, 0.2, 0.5, 0.4)),
        "decoder.layers.0.attn": SiteScores(0, 1, (-0.5,)),
    }
    importance = HeadImportance(scores, "flap", BaseFacts("bart", 2, 4))
    figure = plot_head_importance(importance)
    assert figure.get_suptitle() == "Importance of heads (flap): bart of 2 layers with 4 heads"
    encoder, decoder, bar = figure.axes
    assert [axes.get_title() for axes in (encoder, decoder)] == ["encoder.layers.*.attn", "decoder.layers.*.attn"]
    assert (decoder.get_xlabel(), encoder.get_ylabel()) == ("query head", "layer")
    assert "higher: keep" in bar.get_ylabel()
    assert [text.get_text() for text in encoder.texts] == ["0.1", "0.9", "0.3", "0.2", "0.5", "0.4"]
    assert encoder.images[0].get_array().shape == (2, 4)
    assert encoder.images[0].get_clim() == decoder.images[0].get_clim() == (-0.5, 0.9)
    figure.savefig(tmp_path / "importance.png")
    assert (tmp_path / "importance.png").read_bytes().startswith(b"\x89PNG")


def layers(family, streams, spikiness=(0.5, 0.4)):
    spread = Spread(count=10, mean=1.2, std=0.1, minimum=0.9, maximum=1.6)
    sites = find_sites(FAMILIES[family].make())
    return [LayerTemperatures(site, "ssa", dict.fromkeys(streams, spread), *spikiness) for site in sites]


def test_a_picture_of_temperatures(tmp_path):
    figure = plot_temperatures(layers("llama", ["query", "value"]), title="Learned")
    assert figure.get_suptitle() == "Learned"
    left, right = figure.axes
    assert "inverse temperature" in left.get_ylabel()
    assert right.get_ylabel() == "evenness of attention\n(1: uniform, towards 0: on one key)"
    assert {axes.get_xlabel() for axes in (left, right)} == {"layer"}
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["query", "value"]
    assert [list(line.get_ydata()) for line in right.get_lines()] == [[0.5, 0.5], [0.4, 0.4]]
    extremes = left.collections[0].get_segments()  # one line from smallest to largest per layer
    assert [[round(float(y), 6) for _, y in segment] for segment in extremes] == [[0.9, 1.6]] * 2
    figure.savefig(tmp_path / "temperatures.png")
    assert (tmp_path / "temperatures.png").read_bytes().startswith(b"\x89PNG")


def test_every_tower_and_kind_of_attention_has_a_row_of_its_own():
    figure = plot_temperatures(layers("t5", ["query"], spikiness=(None, None)))
    titles = [axes.get_title() for axes in figure.axes[::2]]
    assert titles == ["ssa, encoder, self attention", "ssa, decoder, self attention", "ssa, decoder, cross attention"]
    assert all(axes.texts[0].get_text() == "not measured" for axes in figure.axes[1::2])


def test_no_temperatures_cannot_be_drawn():
    with pytest.raises(ValueError, match="at least one layer"):
        plot_temperatures([])


def test_matplotlib_is_imported_only_to_draw():
    code = "import sys, patchattn.plotting; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
