"""Rollout, flow and entropy against eager attention's matrices, a worked example and cuts of a graph."""

import itertools
import math
from typing import Any

import networkx
import numpy as np
import pytest
import torch
from networkx.algorithms.flow import edmonds_karp

import patchattn
from patchattn.inspection import rollout
from patchattn.inspection.rollout import attention_entropy, attention_flow, attention_rollout
from patchattn.plotting import plot_rollout

from .families import FAMILIES
from .reference import tiny_llama

IDS = torch.tensor([[3, 7, 1, 9, 22, 5, 13, 40]])


def averaged(model: Any, ids: torch.Tensor, **given: Any) -> np.ndarray:
    """`(L, T, T)` mean over heads, from transformers' eager attention; all in float64."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(ids, **given, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return np.stack([layer[0].numpy().mean(0) for layer in found])


def mixed(attention: np.ndarray) -> np.ndarray:
    with_residual = attention + np.eye(attention.shape[-1])
    return with_residual / with_residual.sum(-1, keepdims=True)


def test_the_worked_example(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[1.0, 0.0], [0.2, 0.8]])
    model = tiny_llama(num_hidden_layers=2)
    tables = {"model.layers.0.self_attn": first.double(), "model.layers.1.self_attn": second.double()}
    monkeypatch.setattr(rollout, "head_weights", lambda call, *_: tables[call.site.name])
    found = attention_rollout(model, {"input_ids": IDS[:, :2]})
    # with half of the residual: (1 0; 0.25 0.75), then (1 0; 0.1 0.9)
    want = torch.tensor([[1.0, 0.0], [0.1 + 0.9 * 0.25, 0.9 * 0.75]]).double()
    torch.testing.assert_close(found.weights[-1], want)
    assert [round(x, 3) for x in found.weights[-1][1].tolist()] == [0.325, 0.675]
    plain = attention_rollout(model, {"input_ids": IDS[:, :2]}, residual=False).weights[-1]
    torch.testing.assert_close(plain, torch.tensor([[1.0, 0.0], [0.2 + 0.8 * 0.5, 0.8 * 0.5]]).double())


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_rollout_multiplies_the_matrices_of_all_layers(padding: str | None) -> None:
    model = tiny_llama(num_hidden_layers=3)
    real = {None: slice(0, 8), "left": slice(3, 8), "right": slice(0, 5)}[padding]
    mask = torch.zeros_like(IDS)
    mask[:, real] = 1
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    found = attention_rollout(model, {"input_ids": IDS, "attention_mask": mask, "position_ids": places})
    product = np.eye(real.stop - real.start)
    for layer, attention in enumerate(mixed(averaged(model, IDS[:, real]))):
        product = attention @ product
        np.testing.assert_allclose(found.weights[layer].numpy(), product, atol=1e-6)
    np.testing.assert_allclose(found.weights.sum(-1), 1.0, atol=1e-6)
    assert found.tokens == tuple(range(8))[real]
    assert float(found.weights.triu(1).abs().max()) == 0.0


def test_flow_is_that_of_another_algorithm_on_a_graph_built_apart() -> None:
    model = tiny_llama(num_hidden_layers=3)
    found = attention_flow(model, {"input_ids": IDS})
    graph = networkx.DiGraph()
    for layer, table in enumerate(mixed(averaged(model, IDS))):
        for i, j in itertools.product(range(8), repeat=2):
            if table[i, j] > 0:
                graph.add_edge(f"{layer + 1}.{i}", f"{layer}.{j}", capacity=table[i, j])
    for layer in (1, 3):
        want = np.zeros((8, 8))
        for i, j in itertools.product(range(8), repeat=2):
            if networkx.has_path(graph, f"{layer}.{i}", f"0.{j}"):
                want[i, j] = networkx.maximum_flow_value(graph, f"{layer}.{i}", f"0.{j}", flow_func=edmonds_karp)
        want /= want.sum(-1, keepdims=True)
        np.testing.assert_allclose(found.weights[layer - 1].numpy(), want, atol=1e-6)


def test_flow_is_the_smallest_cut() -> None:
    """The smallest of all 2^n ways to cut a graph of three tokens and two layers, for every pair."""
    model = tiny_llama(num_hidden_layers=2)
    tables = mixed(averaged(model, IDS[:, :3]))
    nodes = [(layer, token) for layer in range(3) for token in range(3)]

    def smallest(source: tuple[int, int], sink: tuple[int, int]) -> float:
        others = [node for node in nodes if node not in (source, sink)]
        cuts = []
        for sides in itertools.product([False, True], repeat=len(others)):
            inside = {source, *itertools.compress(others, sides)}
            cut = [
                tables[layer - 1][token, lower]
                for layer, token in inside
                for lower in range(3)
                if layer and (layer - 1, lower) not in inside
            ]
            cuts.append(sum(cut))
        return min(cuts)

    want = np.array([[smallest((2, i), (0, j)) for j in range(3)] for i in range(3)])
    got = attention_flow(model, {"input_ids": IDS[:, :3]}).weights[-1].numpy()
    np.testing.assert_allclose(got, want / want.sum(-1, keepdims=True), atol=1e-6)


def test_entropy_of_every_head() -> None:
    model = tiny_llama(num_hidden_layers=2)
    mask = torch.tensor([[1] * 8, [0, 0, 0, 1, 1, 1, 1, 1]])
    given = {"input_ids": IDS.repeat(2, 1), "attention_mask": mask}
    measured = attention_entropy(model, [given])
    model.set_attn_implementation("eager")  # which gives no numbers for rows of padding
    with torch.no_grad():
        found = [model(ids, output_attentions=True).attentions for ids in (IDS, IDS[:, 3:])]
    for layer, one in enumerate(measured):
        assert one.rows == 13
        for head in range(4):
            entropies, shares = [], []
            for attentions in found:
                for i, row in enumerate(attentions[layer][0, head].tolist()):
                    entropies.append(-sum(w * math.log(w) for w in row[: i + 1]))
                    shares.append(entropies[-1] / math.log(i + 1) if i else 0.0)
            assert math.isclose(float(one.entropy[head]), np.mean(entropies), rel_tol=1e-5)
            assert math.isclose(float(one.share[head]), np.mean(shares), rel_tol=1e-5)
            assert math.isclose(float(one.mass[head]), 1.0, rel_tol=1e-6)


def test_a_patched_model_is_rolled_out_as_patched() -> None:
    model = tiny_llama(num_hidden_layers=2)
    plain = attention_rollout(model, {"input_ids": IDS}).weights
    patchattn.patch_model(model, "heads", edit="query")  # uniform attention in all heads
    uniform = np.tril(np.ones((8, 8))) / np.arange(1, 9)[:, None]
    want = np.linalg.matrix_power(mixed(uniform), 2)
    got = attention_rollout(model, {"input_ids": IDS}).weights
    np.testing.assert_allclose(got[-1].numpy(), want, atol=1e-6)
    assert not torch.allclose(got, plain, atol=1e-3)


def test_the_picture_and_what_is_refused() -> None:
    model = tiny_llama(num_hidden_layers=2)
    found = attention_rollout(model, {"input_ids": IDS})
    figure = plot_rollout(found, tokens=list("abcdefgh"), title="here")
    drawn = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(np.ma.filled(drawn, 0.0), 100 * found.weights[-1].numpy(), atol=1e-6)
    with pytest.raises(ValueError, match="layers 0 to 1, got 2"):
        plot_rollout(found, layer=2)
    with pytest.raises(ValueError, match="choose the self-attention of one"):
        attention_rollout(FAMILIES["t5"].make(), FAMILIES["t5"].inputs())
    with pytest.raises(ValueError, match="at most 64 tokens, got 65"):
        attention_flow(model, {"input_ids": IDS[:, :1].repeat(1, 65)})
    with pytest.raises(NotImplementedError, match="Layer 0 of LlamaForCausalLM does not attend, or was left out"):
        attention_rollout(model, {"input_ids": IDS}, modules="layers.1")
    with pytest.raises(ValueError, match="no data"):
        attention_entropy(model, [])
