"""Pictures of attention and of cost: what is drawn is the data, and axes say what they are."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from matplotlib.text import Text

from patchattn.core.host import find_sites
from patchattn.inspection.attention_maps import AttentionMap, ImageAttention, ReceivedAttention, attention_received
from patchattn.plotting import (
    ParetoPoint,
    pareto_front,
    plot_attention_grid,
    plot_attention_map,
    plot_attention_received,
    plot_image_attention,
    plot_pareto,
)
from patchattn.vision.images import ImageSpan

from .families import FAMILIES

SITES = find_sites(FAMILIES["llama"].make())


def received(layer, divisor=None):
    share = torch.tensor([[0.7, 0.1, 0.2], [0.6, 0.1, 0.3]]).double() / (divisor or layer + 1)
    return ReceivedAttention(
        SITES[layer], share, torch.full((3,), 0.1).double(), torch.tensor([1.0, 0.9, 0.1]).double()
    )


def attention(layer, head, count=3):
    weights = torch.ones(count, count).double().tril()
    weights /= weights.sum(-1, keepdim=True)
    places = tuple(range(count))
    return AttentionMap(SITES[layer], head, weights, weights > 0, places, places)


def marks(axes):
    (drawn,) = [line for line in axes.get_lines() if len(line.get_xdata()) and line.get_marker() == "x"]
    return sorted(zip(drawn.get_ydata().tolist(), drawn.get_xdata().tolist(), strict=True))


def test_received_by_layer_is_the_mean_of_heads():
    figure = plot_attention_received([received(0), received(1)], title="Sinks")
    axes, bar = figure.axes
    np.testing.assert_allclose(axes.images[0].get_array(), [[65, 10, 25], [32.5, 5, 12.5]])
    assert (axes.get_title(), axes.get_ylabel(), axes.get_xlabel()) == ("Sinks", "layer", "key, position in tokens")
    assert "%" in bar.get_ylabel()
    assert marks(axes) == [(0, 0)]  # the last key gets much, but is seen by few queries


def test_what_was_received_before_is_drawn_above_in_the_same_colours():
    figure = plot_attention_received([received(0, 2)], before=[received(0)], title="Sinks")
    above, below, _bar = figure.axes
    np.testing.assert_allclose(above.images[0].get_array(), [[70, 10, 20], [60, 10, 30]])
    np.testing.assert_allclose(below.images[0].get_array(), [[35, 5, 10], [30, 5, 15]])
    np.testing.assert_allclose(above.images[0].get_clim(), (5, 70), rtol=1e-6)
    assert above.images[0].get_clim() == below.images[0].get_clim()
    assert (above.get_title(), below.get_title(), figure.get_suptitle()) == ("without the patch", "with it", "Sinks")
    with pytest.raises(ValueError, match="of other layers, heads or keys"):
        plot_attention_received([received(0), received(1)], before=[received(0)])


def test_keys_that_few_queries_see_are_pale_and_do_not_stretch_the_colours():
    """The last key here gets 90 %, of the one query that sees it."""
    share = torch.tensor([[0.5, 0.1, 0.9], [0.5, 0.2, 0.9]]).double()
    seen = torch.tensor([1.0, 0.5, 0.1]).double()
    figure = plot_attention_received([ReceivedAttention(SITES[0], share, torch.full((3,), 0.1).double(), seen)])
    drawn, veil = figure.axes[0].images
    np.testing.assert_allclose(drawn.get_clim(), (10, 50), rtol=1e-6)
    assert np.isnan(veil.get_array().filled(np.nan)).tolist() == [[True, True, False]]
    assert any("seen by less than 25 % of the queries" in text.get_text() for text in figure.legends[0].get_texts())


def test_the_mean_is_over_the_queries_that_see_a_key():
    """A causal model of uniform attention: key j gets 1 / (i + 1) of query i >= j, none is favoured."""
    model = FAMILIES["llama"].make()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name:
                parameter.zero_()
    (first, *_) = attention_received(model, {"input_ids": torch.arange(3, 13)[None]})
    wanted = [sum(1 / (i + 1) for i in range(j, 10)) / (10 - j) for j in range(10)]
    np.testing.assert_allclose(first.share, [wanted] * len(first.share), rtol=1e-6)
    np.testing.assert_allclose(first.seen, [(10 - j) / 10 for j in range(10)])


def test_received_by_head_of_one_layer_with_tokens():
    axes = plot_attention_received([received(0)], tokens=["a", " $b", "\n"]).axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[70, 10, 20], [60, 10, 30]])
    assert axes.get_ylabel() == "query head"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["a", "␣\\$b", "\\n"]
    assert marks(axes) == [(0, 0), (1, 0)]


def test_a_map_hides_what_the_mask_hides(tmp_path):
    figure = plot_attention_map(attention(1, 3), tokens=["a", "b", "c"])
    axes, bar = figure.axes
    drawn = np.ma.filled(axes.images[0].get_array(), np.nan)
    np.testing.assert_allclose(drawn, [[100, np.nan, np.nan], [50, 50, np.nan], [100 / 3, 100 / 3, 100 / 3]])
    assert "Layer 1, head 3" in axes.get_title()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("key", "query")
    assert "%" in bar.get_ylabel()
    figure.savefig(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_a_large_map_shows_positions():
    axes = plot_attention_map(attention(0, 0, 60), tokens=["a"] * 60).axes[0]
    assert axes.get_xlabel() == "key, position in tokens"
    assert len(axes.get_xticks()) <= 12


def test_a_grid_has_a_row_per_layer_and_a_column_per_head():
    figure = plot_attention_grid([attention(layer, head) for layer in (0, 1) for head in (0, 2, 3)])
    *pictures, bar = figure.axes
    assert [axes.get_title() for axes in pictures[:3]] == ["0", "2", "3"]
    assert [axes.get_ylabel() for axes in pictures[::3]] == ["0", "1"]
    assert {axes.images[0].get_clim() for axes in pictures} == {(0, 100)}
    assert "%" in bar.get_ylabel()


def test_attention_over_a_picture():
    grid = torch.tensor([[0.1, 0.0, 0.2], [0.0, 0.3, 0.0]]).double()
    found = ImageAttention(ImageSpan(0, 2, 8, (2, 3)), grid, 0.6, 2, 8)
    figure = plot_image_attention(np.zeros((20, 30, 3), dtype=np.uint8), found)
    plain, covered, bar = figure.axes
    assert plain.images[0].get_array().shape == (20, 30, 3)
    np.testing.assert_allclose(covered.images[0].get_array(), 100 * grid.numpy())
    assert covered.images[0].get_extent() == [-0.5, 29.5, 19.5, -0.5]
    assert "60.0 %" in covered.get_title()
    assert "%" in bar.get_ylabel()


POINTS = [
    ParetoPoint("plain", 80.0, 10.0),
    ParetoPoint("fast", 78.0, 5.0),
    ParetoPoint("slow", 79.0, 11.0),
    ParetoPoint("same", 80.0, 10.0),
]


def test_the_front_holds_who_is_not_beaten_in_both():
    assert [point.name for point in pareto_front(POINTS)] == ["fast", "plain", "same"]
    assert [point.name for point in pareto_front(POINTS, higher_is_better=False)] == ["fast"]
    assert [point.name for point in pareto_front(POINTS, lower_cost_is_better=False)] == ["plain", "same", "slow"]


def test_quality_over_cost():
    axes = plot_pareto(POINTS, score="accuracy, %", cost="time, ms").axes[0]
    front, beaten = axes.get_lines()
    assert list(zip(front.get_xdata(), front.get_ydata(), strict=True)) == [(5.0, 78.0), (10.0, 80.0), (10.0, 80.0)]
    assert list(zip(beaten.get_xdata(), beaten.get_ydata(), strict=True)) == [(11.0, 79.0)]
    assert axes.get_xlabel() == "time, ms (lower is better)"
    assert axes.get_ylabel() == "accuracy, % (higher is better)"
    assert {text.get_text() for text in axes.texts} == {point.name for point in POINTS}


def test_names_of_points_that_lie_close_together_cover_neither_each_other_nor_points():
    points = [ParetoPoint(f"variant {index}", 80 + 0.01 * (index % 3), 10 + 0.01 * index) for index in range(8)]
    figure = plot_pareto([*points, ParetoPoint("far", 60.0, 20.0)])
    figure.draw_without_rendering()
    axes = figure.axes[0]
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the line to the point
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    places = axes.transData.transform([(point.cost, point.score) for point in points])
    assert not any(box.contains(*place) for box in boxes for place in places)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot_attention_received([]), "nothing to draw"),
        (lambda: plot_attention_received([received(0)], tokens=["a"]), "3 keys, but 1 tokens"),
        (
            lambda: plot_attention_received(
                [received(0), dataclasses.replace(received(1), site=dataclasses.replace(SITES[1], is_cross=True))]
            ),
            "several towers",
        ),
        (lambda: plot_attention_map(attention(0, 0), tokens=["a"]), "there are 1 tokens"),
        (lambda: plot_attention_grid([]), "nothing to draw"),
        (lambda: plot_pareto([]), "nothing to draw"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
