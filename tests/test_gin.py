"""Sparse-GIN against loops in float64, at its start, in chunks of rows and of calls, with padding; and refusals."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

import patchattn
from patchattn.softmax import rows

from .behaviour import close, randomise, variant_parameters
from .families import FAMILIES, outputs
from .pieces import in_chunks
from .reference import DIM, HEADS, KV_HEADS, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13], [2, 8, 8, 1, 30, 4, 6]])
WIDE = 5


def live(**settings: Any) -> Any:
    model = patchattn.patch_model(tiny_llama(), "gin", width=WIDE, **settings)
    randomise(model)
    return model


def added(own: Any, call: Any, text: int) -> np.ndarray:
    """`(T, H, D)` what is added in a text, from the queries, keys and inputs of attention."""
    learned = {name: value.detach().numpy() for name, value in own.named_parameters()}
    query, key, x = (each[text].numpy() for each in (call.query, call.key, call.context.layer_input()))
    nodes, found = x @ learned["inward"].T, np.zeros((len(x), HEADS, DIM))
    for i in range(len(x)):
        total = np.zeros(i + 1)
        for head in range(HEADS):
            raised = np.exp(key[head * KV_HEADS // HEADS, : i + 1] @ query[head, i] / np.sqrt(DIM))
            total += raised / raised.sum()
        node = learned["own"] * nodes[i]
        for j in range(i + 1):
            edge = 1 / (1 + np.exp(-own.config.slope * (min(total[j], 1.0) - own.config.centre)))
            if edge >= own.config.smallest and (own.config.graph == "seen" or j == i):
                node = node + edge * nodes[j]
        hidden = learned["first"] @ node
        hidden = (hidden - hidden.mean()) / np.sqrt(hidden.var() + 1e-5)
        node = node + learned["second"] @ np.maximum(hidden, 0)
        found[i] = learned["outward"] @ node
    return found


@pytest.mark.parametrize("settings", [{}, {"graph": "self"}, {"centre": 0.3, "slope": 4.0, "smallest": 0.7}], ids=str)
@torch.no_grad()
def test_by_loops(settings: dict[str, Any]) -> None:
    model, seen = live(**settings), {}
    own = model.model.layers[0].self_attn.patchattn.gin
    for at in ("base", "model"):
        with patchattn.probed(model, lambda *found, at=at: seen.update({at: found}), at=at):
            model(TOKENS)
    for text in range(2):
        want = seen["base"][1][text].numpy() + added(own, seen["model"][0], text)
        np.testing.assert_allclose(seen["model"][1][text].numpy(), want, rtol=0, atol=1e-10)


def test_the_graph_reads_other_tokens_and_that_of_the_released_code_none() -> None:
    for graph, moves in (("seen", True), ("self", False)):
        model = live(graph=graph, smallest=0.0)
        x = torch.randn(1, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        other = x.clone()
        other[:, 2] += 1.0
        nodes = []
        with torch.no_grad():
            model.model.layers[0].self_attn.patchattn.gin.own.zero_()
            for states in (x, other):
                own = patchattn.patch_model(tiny_llama(), "gin", width=WIDE, graph=graph, smallest=0.0)
                own.model.layers[0].self_attn.q_proj.weight.zero_()  # weights are the same, whatever the tokens
                own.model.layers[0].self_attn.v_proj.weight.zero_()
                gin = own.model.layers[0].self_attn.patchattn.gin
                gin.load_state_dict(model.model.layers[0].self_attn.patchattn.gin.state_dict())
                nodes.append(own.model(inputs_embeds=states, use_cache=False).last_hidden_state[0, 4])
        assert (float((nodes[0] - nodes[1]).abs().max()) > 1e-6) is moves, graph


def test_it_starts_at_the_model_and_everything_learns_by_the_second_step() -> None:
    model = FAMILIES["llama"].make()
    before = outputs(model, input_ids=TOKENS)[0]
    patchattn.patch_model(model, "gin", width=WIDE)
    assert torch.equal(outputs(model, input_ids=TOKENS)[0], before)
    learned = variant_parameters(model)
    optimizer = torch.optim.SGD(learned.values(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        (model(TOKENS).logits * torch.linspace(-1, 1, 64)).sum().backward()
        for name, parameter in learned.items():  # everything stands behind an outward projection of 0
            assert bool((parameter.grad.abs() > 0).any()) is (step == 1 or "outward" in name), name
        optimizer.step()


@pytest.mark.parametrize("graph", ["seen", "self"])
def test_rows_and_gradients_in_chunks(monkeypatch: pytest.MonkeyPatch, graph: str) -> None:
    model, found = live(graph=graph), []
    for entries in (2**24, 1):
        monkeypatch.setattr(rows, "_ENTRIES", entries)
        model.zero_grad()
        logits = model(TOKENS).logits
        logits.square().sum().backward()
        found.append([logits, *(parameter.grad.clone() for parameter in variant_parameters(model).values())])
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("chunks", "graph"), [([9], "seen"), ([4, 3, 1, 1], "seen"), ([4, 3, 1, 1], "self")], ids=str)
@torch.no_grad()
def test_padding_in_one_call_or_in_chunks(chunks: list[int], graph: str) -> None:
    model = live(graph=graph)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]])
    tokens = torch.randint(1, 50, mask.shape, generator=torch.Generator().manual_seed(0))
    found = in_chunks(model, tokens, mask, chunks)
    for text, real, got in zip(tokens, mask.bool(), found, strict=True):
        close(got[real], model(text[real][None]).logits[0])


def test_what_it_refuses() -> None:
    assert patchattn.variant_info("gin").configure({"preset": "released"}).graph == "self"
    with pytest.raises(NotImplementedError, match="graph='self' is what a causal filter leaves"):
        patchattn.patch_model(FAMILIES["bert"].make(), "gin", graph="self")
    with pytest.raises(NotImplementedError, match="gin does not support cross"):
        patchattn.patch_model(FAMILIES["t5"].make(), "gin", modules="EncDecAttention")
    with pytest.raises(TypeError, match=r"graph must be Literal\['seen', 'self'\], got 'none'"):
        live(graph="none")
    model = live()
    own = model.model.layers[0].self_attn.patchattn.gin
    own.outward = torch.nn.Parameter(own.outward[:, :3])
    with pytest.raises(NotImplementedError, match=r"gives every head of .* 3 channels, and its values are 8 wide"):
        model(TOKENS)


def test_keys_that_are_fewer_than_the_tokens_of_their_layer_are_refused() -> None:
    stages = {"depths": [1, 1], "hidden_sizes": [8, 8], "num_attention_heads": [2, 2], "mlp_ratios": [1, 1]}
    patches = {"patch_sizes": [4, 2], "strides": [4, 2], "sequence_reduction_ratios": [2, 1]}
    model = tf.PvtModel(tf.PvtConfig(image_size=32, num_encoder_blocks=2, **stages, **patches)).eval()
    patchattn.patch_model(model, "gin", width=WIDE)
    with pytest.raises(NotImplementedError, match=r"attends to 16 keys of 64 tokens"):
        model(torch.randn(1, 3, 32, 32))
