"""Scores of what heads are for, against loops over whole attention matrices, plain gradients and plain hooks."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from patchattn.inspection.head_roles import ablation_scores, gradient_scores, minus, position_scores, rarity_scores

from .reference import DIM, HEADS, KV_HEADS, tiny_llama
from .test_task_vectors import ROWS, padded

LAYERS = 2


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(num_hidden_layers=LAYERS)


def matrices(model: Any) -> list[Any]:
    """Of every text alone `(layers, heads, T, T)`."""
    eager = tiny_llama(num_hidden_layers=LAYERS, attn_implementation="eager")
    with torch.no_grad():
        return [torch.cat(eager(torch.tensor([tokens]), output_attentions=True).attentions).numpy() for tokens in ROWS]


def table(found: Any) -> np.ndarray:
    return np.array([found.scores[f"model.layers.{layer}.self_attn"] for layer in range(LAYERS)])


@pytest.mark.parametrize(("offset", "side"), [(-1, "left"), (0, "right"), (-3, "left")])
def test_the_share_of_rows_that_look_there(model: Any, offset: int, side: str) -> None:
    hits, rows, chance = np.zeros((LAYERS, HEADS)), 0, 0.0
    for weights in matrices(model):
        for row in range(1, weights.shape[-1]):  # the first sees itself alone
            if row + offset < 0:
                continue
            rows, chance = rows + 1, chance + 1 / (row + 1)
            for layer, head in np.ndindex(LAYERS, HEADS):
                hits[layer, head] += weights[layer, head, row, : row + 1].argmax() == row + offset
    found = position_scores(model, [padded(side)], offset=offset)
    np.testing.assert_allclose(table(found), hits / rows, atol=1e-12)
    assert 0 < table(found).max() < 1
    assert found.settings == {"offset": offset, "chance": pytest.approx(chance / rows)}
    assert (found.method, found.tokens) == ("position", rows)


def test_a_token_that_no_row_sees_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="the key at the distance 1 and another"):
        position_scores(model, [padded("left")], offset=1)
    with pytest.raises(ValueError, match=r"evaluation mode: model.eval\(\)"):
        position_scores(tiny_llama().train(), [padded("left")])


@pytest.mark.parametrize("given", [None, [9.0, 4, 7, 1, 3, 2, 8, 5, 6, 6, *[2.0] * 40]])
def test_rank_correlations_of_attention_with_rarity(model: Any, given: Any) -> None:
    said = [token for tokens in ROWS for token in tokens]
    counts = given or [1 + said.count(token) for token in range(50)]
    want = np.zeros((LAYERS, HEADS))
    for tokens, weights in zip(ROWS, matrices(model), strict=True):
        length = len(tokens)
        rare = [-math.log(counts[token]) for token in tokens]
        for layer, head in np.ndindex(LAYERS, HEADS):
            received = [weights[layer, head, key:, key].mean() for key in range(length)]
            want[layer, head] += spearmanr(received[1:], rare[1:]).statistic / len(ROWS)
    found = rarity_scores(model, [padded("left")], counts=given)
    np.testing.assert_allclose(table(found), want, atol=1e-9)
    assert np.abs(want).max() > 0.3
    with pytest.raises(ValueError, match="a number above 0 of every id"):
        rarity_scores(model, [padded("left")], counts=[1.0] * 5)
    with pytest.raises(ValueError, match="No text has three tokens"):
        rarity_scores(model, [{"input_ids": torch.tensor([[3, 4]])}])


def test_gradients_of_a_heads_weights(model: Any) -> None:
    want = np.zeros((LAYERS, HEADS))
    for tokens in ROWS:
        ids = torch.tensor([tokens])
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        for layer, head in np.ndindex(LAYERS, HEADS):
            module, group = model.model.layers[layer].self_attn, head * KV_HEADS // HEADS
            own, shared = slice(head * DIM, (head + 1) * DIM), slice(group * DIM, (group + 1) * DIM)
            sizes = [
                module.q_proj.weight.grad[own],
                module.o_proj.weight.grad[:, own],
                module.k_proj.weight.grad[shared],
                module.v_proj.weight.grad[shared],
            ]
            want[layer, head] += sum(float(size.abs().sum()) for size in sizes) / len(ROWS)
    model.zero_grad()
    found = gradient_scores(model, [padded("right")])
    np.testing.assert_allclose(table(found), want, rtol=1e-5)  # the loss is in float32
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="takes no gradients"):
        gradient_scores(tiny_llama().requires_grad_(False), [padded("right")])


def likelihood(model: Any, answers: list[int], silent: tuple[int, int] | None = None) -> float:
    """Mean natural logarithm of the probability of an answer after each text alone, a head's columns read as zero."""
    handle = None
    if silent is not None:

        def zero(module: nn.Module, args: Any) -> Any:
            new = args[0].clone()
            new[..., silent[1] * DIM : (silent[1] + 1) * DIM] = 0
            return (new,)

        handle = model.model.layers[silent[0]].self_attn.o_proj.register_forward_pre_hook(zero)
    with torch.no_grad():
        found = [
            float(model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)[answer])
            for tokens, answer in zip(ROWS, answers, strict=True)
        ]
    if handle is not None:
        handle.remove()
    return sum(found) / len(found)


def test_what_an_answer_loses_without_a_head(model: Any) -> None:
    found = [
        ablation_scores(model, [padded(side)], [answers]) for side, answers in (("left", [5, 17]), ("right", [3, 9]))
    ]
    for scores, answers in zip(found, ([5, 17], [3, 9]), strict=True):
        dense = likelihood(model, answers)
        want = [[dense - likelihood(model, answers, (layer, head)) for head in range(HEADS)] for layer in range(LAYERS)]
        np.testing.assert_allclose(table(scores), want, rtol=1e-6, atol=1e-9)
        assert np.abs(want).max() > 0.05
    between = minus(found[0], found[1], "temporal")
    np.testing.assert_allclose(table(between), table(found[0]) - table(found[1]))
    assert between.method == "temporal"
    assert between.highest(1).heads
    with pytest.raises(ValueError, match="not of the same heads"):
        minus(found[0], position_scores(tiny_llama(), [padded("left")]), "temporal")
    with pytest.raises(ValueError, match="1 answers for 2 sequences"):
        ablation_scores(model, [padded("left")], [[5]])
    with pytest.raises(ValueError, match="not as many lists of answers as batches"):
        ablation_scores(model, [padded("left")], [])
