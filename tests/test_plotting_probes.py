"""Pictures of entropy and of directions of attention: what is drawn is the data."""

import dataclasses

import numpy as np
import pytest
import torch

from patchattn.core.heads import BaseFacts
from patchattn.inspection.attention_directions import AttentionDirections
from patchattn.inspection.lookback import LookbackProbe
from patchattn.inspection.rollout import AttentionEntropy
from patchattn.plotting import (
    plot_attention_directions,
    plot_attention_entropy,
    plot_lookback_probe,
    plot_vector_layers,
)

from .test_plotting_attention import SITES


def entropy(layer: int, *shares: float) -> AttentionEntropy:
    share = torch.tensor(shares, dtype=torch.float64)
    return AttentionEntropy(SITES[layer], 2 * share, share, torch.ones(len(shares)), 5)


def test_every_head_and_the_mean_of_a_layer() -> None:
    cross = entropy(0, 0.4)
    cross = dataclasses.replace(cross, site=dataclasses.replace(SITES[0], is_cross=True))
    figure = plot_attention_entropy([entropy(0, 0.1, 0.5), entropy(1, 0.2, 0.8), cross], title="Here")
    own, other = figure.axes
    heads, means = (line.get_xydata().tolist() for line in own.get_lines())
    assert heads == [[0, 0.1], [0, 0.5], [1, 0.2], [1, 0.8]]
    np.testing.assert_allclose(means, [[0, 0.3], [1, 0.5]])
    assert ("self" in own.get_title(), "cross" in other.get_title()) == (True, True)
    assert other.get_lines()[0].get_xydata().tolist() == [[0, 0.4]]
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_attention_entropy([])


def test_directions_and_those_that_write_along_them() -> None:
    terms = torch.tensor([0.5, 3.0, -0.25, 0.75], dtype=torch.float64)
    found = AttentionDirections(SITES[1], 2, 4.0, terms, (1, 3), {(0, 0): 0.5, (0, 1): -1.0}, {(0, 1): 2.0})
    figure = plot_attention_directions(found, writers=2)
    bars, writers = figure.axes
    assert [bar.get_height() for bar in bars.patches] == terms.tolist()
    colours = [bar.get_facecolor() for bar in bars.patches]
    assert colours[1] == colours[3] != colours[0] == colours[2]
    assert "2 of 4 used (blue); all add up to 4.00" in bars.get_title()
    assert [bar.get_width() for bar in writers.patches] == [2.0, 0.5]
    assert [label.get_text() for label in writers.get_yticklabels()] == ["0-1, at the key", "0-0, at the query"]
    first = dataclasses.replace(found, query_writers={}, key_writers={})
    assert len(plot_attention_directions(first).axes) == 1
    with pytest.raises(ValueError, match="at least 1, got 0"):
        plot_attention_directions(found, writers=0)


def test_weights_of_a_probe_and_layers_of_a_vector() -> None:
    base = BaseFacts("llama", 2, 3)
    figure = plot_lookback_probe(LookbackProbe(((0.5, -1.0, 0.0), (2.0, 0.25, 0.75)), 0.1, base))
    drawn = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(drawn, [[0.5, -1.0, 0.0], [2.0, 0.25, 0.75]])
    with_vector, without = plot_vector_layers({1: 0.75, 0: 0.25}, 0.5).axes[0].get_lines()
    assert with_vector.get_xydata().tolist() == [[0, 25], [1, 75]]
    assert set(without.get_ydata()) == {50}
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_vector_layers({}, 0.5)
