"""Codes of heads: planted clusters are told apart, scores are by sets, outputs are those of last tokens."""

from typing import Any

import numpy as np
import pytest
import torch

from patchattn.inspection import head_codes
from patchattn.inspection.head_codes import code_scores, own_codes

from .reference import DIM, HEADS, tiny_llama
from .test_task_vectors import ROWS, padded


def test_scores_are_shares_of_codes_that_are_not_shared() -> None:
    draw = np.random.default_rng(0)
    positive, negative = draw.integers(0, 5, (6, 7)), draw.integers(0, 5, (4, 7))
    want = [np.mean([code not in set(negative[:, head]) for code in positive[:, head]]) for head in range(7)]
    np.testing.assert_allclose(own_codes(torch.tensor(positive), torch.tensor(negative)), want)
    assert 0 < np.mean(want) < 1


def test_outputs_are_of_the_last_tokens() -> None:
    model: Any = tiny_llama(num_hidden_layers=2)
    sites = head_codes.select_sites(model)
    for side in ("left", "right"):
        found = head_codes._last_outputs(model, [padded(side)], sites)
        for row, tokens in enumerate(ROWS):
            kept: list[torch.Tensor] = []
            handles = [
                layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0][0, -1]))
                for layer in model.model.layers
            ]
            with torch.no_grad():
                model(torch.tensor([tokens]))
            for handle in handles:
                handle.remove()
            np.testing.assert_allclose(found[row], torch.cat(kept).view(2 * HEADS, DIM), atol=1e-12)


def test_planted_heads_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two heads give another direction where the task is, the others the same as ever; all with a little noise."""
    model, planted = tiny_llama(num_hidden_layers=2), (2, 5)
    directions = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(1)).double()).Q
    given = iter((True, False))

    def outputs(*_: Any) -> torch.Tensor:
        is_task = next(given)
        own = [directions[7 if is_task and head in planted else head % 7] for head in range(2 * HEADS)]
        noise = torch.randn(8, 2 * HEADS, DIM, generator=torch.Generator().manual_seed(int(is_task))).double()
        return torch.stack(own) + 0.02 * noise

    monkeypatch.setattr(head_codes, "_last_outputs", outputs)
    found = code_scores(model, [], [], features=16)
    scores = np.concatenate(list(found.scores.values()))
    assert set(np.flatnonzero(scores > 0.5)) == set(planted)
    assert max(score for head, score in enumerate(scores) if head not in planted) <= 0.25


def test_the_same_prompts_have_no_codes_of_their_own() -> None:
    model = tiny_llama(num_hidden_layers=2)
    found = code_scores(model, [padded("left")], [padded("right")], steps=5)
    assert {score for scores in found.scores.values() for score in scores} == {0.0}
    assert (found.method, found.tokens) == ("codes", 4)
    with pytest.raises(ValueError, match="2 prompts with the task and 0 without"):
        code_scores(model, [padded("left")], [])
    with pytest.raises(ValueError, match="features and steps are at least 1"):
        code_scores(model, [padded("left")], [padded("left")], features=0)
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        code_scores(model.train(), [padded("left")], [padded("left")])
