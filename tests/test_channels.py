"""Statistics of channels against numpy on what hooks see of unpadded examples."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchattn.inspection.channels import RunningMoments, channel_statistics

from .test_importance import OUTPUTS, examples, inputs_of, make, padded


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_statistics_of_channels(family: str) -> None:
    model, data = make(family), examples(family)
    mlps = {
        "llama": "model.layers.1.mlp.down_proj",
        "gpt2": "transformer.h.1.mlp.c_proj",
        "bert": "bert.encoder.layer.1.output.dense",
        "t5": "decoder.block.1.layer.2.DenseReluDense.wo",
    }
    names = [*OUTPUTS[family].values(), mlps[family]]
    found = channel_statistics(model, [padded(data[:3]), padded(data[3:], left=family == "llama")], names)
    assert list(found) == names
    for name, statistics in found.items():
        x = inputs_of(model, name, data)
        assert statistics.tokens == len(x)
        np.testing.assert_allclose(statistics.mean, x.mean(0), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(statistics.variance, x.var(0, ddof=1), rtol=1e-6, atol=1e-9)
        each = [np.abs(inputs_of(model, name, [example])).mean(0) for example in data]
        np.testing.assert_allclose(statistics.mean_abs, np.mean(each, axis=0), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(statistics.norm, np.linalg.norm(x, axis=0), rtol=1e-6, atol=1e-9)
    assert not model._forward_pre_hooks
    assert not any("patchattn" in name for name, _ in model.named_modules())


def test_mistakes_with_channels() -> None:
    model = make("llama")
    with pytest.raises(ValueError, match="did you mean"):
        channel_statistics(model, examples("llama"), ["model.layers.0.mlp.down_prj"])
    with pytest.raises(ValueError, match="at least two tokens"):
        channel_statistics(model, [], ["model.layers.0.mlp.down_proj"])
    with pytest.raises(ValueError, match=r"model\.eval"):
        channel_statistics(model.train(), [], [])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.sampled_from([0.0, 1e6, -1e8]))
def test_moments_in_parts_are_those_of_the_whole(sizes: list[int], offset: float) -> None:
    if sum(sizes) < 2:
        return
    rows = np.random.default_rng(sum(sizes)).normal(size=(sum(sizes), 3)) + offset
    moments = RunningMoments()
    for part in np.split(rows, np.cumsum(sizes)[:-1]):
        padded = np.concatenate([part, np.full((2, 3), np.nan)])  # padding may hold anything
        moments.add(torch.from_numpy(padded)[None], torch.arange(len(padded))[None] < len(part))
    found = moments.statistics()
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.variance, rows.var(0, ddof=1), rtol=1e-6)
    np.testing.assert_allclose(found.norm, np.linalg.norm(rows, axis=0), rtol=1e-12)
    means = [np.abs(part).mean(0) for part in np.split(rows, np.cumsum(sizes)[:-1]) if len(part)]
    np.testing.assert_allclose(found.mean_abs, np.mean(means, axis=0), rtol=1e-12)
