"""Numbers that the pages give of released codes, computed from the rules as the pages describe them."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf

import patchattn

PAGES = Path(__file__).parents[1] / "docs" / "variants"


def page(name: str) -> str:
    return " ".join((PAGES / f"{name}.md").read_text(encoding="utf-8").split())


def test_rows_of_acts_released_decoding() -> None:
    """Sinks above 0.1 but the first keep 0.4, all keys get what is freed in proportion, the first is set to 1."""
    sums = []
    for first in (0.05, 0.2, 0.5, 0.8):
        row = np.array([first, *3 * [(1 - first) / 3]])
        sinks = np.flatnonzero(row > 0.1)[1:]
        changed = row.copy()
        changed[sinks] *= 0.4
        changed += 0.6 * row[sinks].sum() * row / row.sum()
        changed[0] = 1.0
        sums.append(f"{changed.sum():.2f}")
    assert f"{', '.join(sums[:3])} or {sums[3]}" in page("act")


@pytest.mark.parametrize("samples", [8, 512])
def test_weights_of_samples_in_flaps_released_variance(samples: int) -> None:
    """Its running update, where the old mean is the new one as they share memory, against weights written out."""
    inputs = np.random.default_rng(0).normal(size=(samples, 5))
    mean = fluctuation = 0.0
    deviations = []
    for before, row in enumerate(inputs):
        mean = mean * before / (before + 1) + row.mean() / (before + 1)
        deviations.append(((row - mean) ** 2).sum())
        if before:
            fluctuation = fluctuation * (before - 1) / before + deviations[-1] / (before + 1)
    number = np.arange(1, samples + 1)
    weights = (number - 1) / number / (samples - 1)
    assert fluctuation == pytest.approx(weights @ np.array(deviations), rel=1e-12)
    assert f"{weights.sum():.3f} of the length for {samples} samples" in page("flap")


def test_flaps_released_price_of_a_head() -> None:
    prices = torch.ones_like(torch.arange(2))
    prices[0] = 512 / 3
    assert f"written into a tensor of integers: {int(prices[0])}" in page("flap")


def test_mohs_released_counts() -> None:
    text, released, ours = page("moh"), [], []
    for heads in (6, 10, 14):
        released.append(int(heads * 0.5) + int(heads * 0.25))
        config = tf.LlamaConfig(
            hidden_size=4 * heads, intermediate_size=8, num_hidden_layers=1, num_attention_heads=heads, vocab_size=8
        )
        model = patchattn.patch_model(tf.LlamaForCausalLM(config), "moh", preset="llama3_8b_75")
        variant = model.model.layers[0].self_attn.patchattn.moh
        ours.append(variant.shared + variant.budget)
    expected = "keeps {}, {} and {} of 6, 10 and 14 heads where {}, {} and {} are kept here"
    assert expected.format(*released, *ours) in text


def test_mohs_released_norms_in_bfloat16() -> None:
    """8 of 16 heads of width 128, as LLaMA3-8B's routed ones, with random queries."""
    query = torch.randn(8000, 16, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    coarse = query.norm(dim=-1)
    assert coarse.dtype == torch.bfloat16
    chosen = [
        torch.zeros(8000, 16).scatter(-1, scores.topk(8, dim=-1).indices, 1.0)
        for scores in ((coarse / coarse.std(-1, keepdim=True)).softmax(-1), query.float().norm(dim=-1))
    ]
    share = float((chosen[0] != chosen[1]).any(-1).float().mean())
    assert share == pytest.approx(0.15, abs=0.015)
    assert "one token in seven (15 %)" in page("moh")


def test_vars_presets_are_the_papers_settings() -> None:
    """p is the share that moves, and rho bounds the share of the image tokens that are not sinks from below."""
    for preset, rho in (("paper", 0.8), ("paper_hallucination", 0.5), ("paper_vision_centric", 0.9)):
        config = patchattn.variant_info("var").configure({"preset": preset})
        assert config.move_fraction == 0.6
        assert config.max_sink_share == pytest.approx(1 - rho)
