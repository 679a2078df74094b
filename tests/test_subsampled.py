"""Stochastically subsampled attention (arXiv 2306.01705): which keys are drawn, how often, and by what."""

import pytest
import torch

import patchattn
from patchattn.reading.draws import drawn_numbers

from .behaviour import close, decoded, text
from .families import FAMILIES, outputs
from .reference import tiny_llama
from .selecting import Recorded, assert_reads, assert_texts_are_apart, recorded

TOKENS = torch.arange(3, 33)[None]
SEEDED = {"keep": 0.4, "when": "always", "seed": 3}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    return recorded(monkeypatch)


def number(place: int, seed: int, layer: int) -> int:
    """The number of 32 bits that is drawn for a place, in Python's integers."""
    mixed = place + (layer + 1) * 0x9E3779B1
    for more in (0, 2):
        mixed = (mixed + seed) % 2**32
        for shift, factor in ((16, 0x4F1BBCDD), (15, 0x6C8E9CF5)):
            mixed = (mixed ^ (mixed >> shift)) * (factor + more) % 2**32
    return mixed ^ (mixed >> 15)


def test_seeded_draws_are_read_with_each_tokens_own_key() -> None:
    model = patchattn.patch_model(tiny_llama(), "subsampled", **SEEDED)
    drawn = {j for j in range(30) if number(j + 1, 3, 0) < 0.4 * 2**32}
    assert 0 < len(drawn) < 30
    assert_reads(model, TOKENS, lambda head, i, j: j == i or j in drawn)
    close(decoded(model, TOKENS, [11, 1, 1, 17]), outputs(model, input_ids=TOKENS)[0])
    exact = patchattn.patch_model(FAMILIES["llama"].make_exact(), "subsampled", **SEEDED)
    for side in ("left", "right"):
        assert_texts_are_apart(exact, side)


def test_numbers_are_spread_evenly_and_differ_between_seeds_and_layers() -> None:
    place = torch.arange(1, 20001)
    found = [drawn_numbers(place, seed, layer) / 2**32 for seed, layer in ((0, 0), (1, 0), (0, 1), (7, 3))]
    for numbers in found:
        counts = numbers.histc(20, 0.0, 1.0)
        assert float(((counts - 1000) ** 2 / 1000).sum()) < 50  # chi-squared of 19: 43.8 at one in a thousand
        for lag in (1, 2, 3, 8, 64):
            assert abs(float(torch.corrcoef(torch.stack([numbers[lag:], numbers[:-lag]]))[0, 1])) < 0.03
    pairs = torch.corrcoef(torch.stack(found)) - torch.eye(4)
    assert float(pairs.abs().max()) < 0.03


def test_every_training_step_layer_and_text_draws_anew_as_often_as_it_is_told(calls: Recorded) -> None:
    model = patchattn.patch_model(FAMILIES["llama"].make(), "subsampled", keep=0.3)
    model.train()
    torch.manual_seed(0)
    for _ in range(40):
        outputs(model, input_ids=text(12), use_cache=False)
    found = [seen for _, seen, _ in calls]
    sets = {tuple(seen[row, 0, -1].tolist()) for seen in found for row in range(2)}
    assert len(sets) > 80
    assert all(torch.equal(seen[:, :1].expand_as(seen), seen) for seen in found)  # alike for all heads
    shares = torch.stack([seen[:, 0, -1, :-1].double().mean() for seen in found])
    assert float(shares.mean()) == pytest.approx(0.3, abs=0.03)


def test_it_acts_while_training_alone_unless_it_is_to_act_always() -> None:
    model, tokens = FAMILIES["llama"].make(), text(12)
    expected = outputs(model, input_ids=tokens)[0]
    patchattn.patch_model(model, "subsampled", keep=0.3)
    assert torch.equal(outputs(model, input_ids=tokens)[0], expected)
    model.train()
    assert not torch.equal(outputs(model, input_ids=tokens)[0], expected)
    patchattn.unpatch_model(model.eval())
    with patchattn.patched(model, "subsampled", keep=1.0, when="always"):
        assert torch.equal(outputs(model, input_ids=tokens)[0], expected)
    with patchattn.patched(model, "subsampled", keep=0.3, when="always"):
        one, other = (outputs(model, input_ids=tokens)[0] for _ in range(2))
        assert not torch.equal(one, other)


def test_activation_checkpointing_repeats_a_draw() -> None:
    found = []
    for checkpointing in (False, True):
        model = patchattn.patch_model(FAMILIES["llama"].make(), "subsampled", keep=0.3)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        model(text(12), use_cache=False).logits.square().sum().backward()
        found.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    close(*found)


def test_shares_beyond_all_are_refused() -> None:
    with pytest.raises(ValueError, match="keep must lie between 0"):
        patchattn.patch_model(tiny_llama(), "subsampled", keep=1.5)
