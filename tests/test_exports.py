"""Exports: maps against what eager returns, queries and keys against projections and rotation by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from patchattn.inspection.exports import bertviz_inputs, queries_and_keys

from .families import FAMILIES
from .reference import DIM, HEADS, KV_HEADS, rotate, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5], [4, 4, 8, 2, 30, 6]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
TEXTS = [list("abcdef"), list("__cdef")]
INPUTS = {"input_ids": TOKENS, "attention_mask": MASK}


def test_bertviz_gets_what_eager_returns_without_padding() -> None:
    model = tiny_llama(num_hidden_layers=2)
    found = bertviz_inputs(model, INPUTS, TEXTS[1], row=1)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        want = model(TOKENS[1:, 2:], output_attentions=True).attentions  # rotary embedding is of distances
    assert found["tokens"] == list("cdef")
    assert len(found["attention"]) == 2
    for layer, expected in zip(found["attention"], want, strict=True):
        assert layer.shape == (1, HEADS, 4, 4)
        torch.testing.assert_close(layer[0], expected[0].float(), rtol=0, atol=1e-6)


def test_queries_and_keys_are_those_that_attention_compares(tmp_path: Path) -> None:
    model, inputs = tiny_llama(num_hidden_layers=2), []
    layers = [layer.self_attn for layer in model.model.layers]
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: inputs.append(kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in layers
    ]
    with torch.no_grad():
        model(TOKENS)
    for handle in handles:
        handle.remove()
    batches = [{"input_ids": TOKENS[:1]}, {"input_ids": TOKENS, "attention_mask": MASK}]
    found = queries_and_keys(model, batches, [TEXTS[:1], TEXTS])
    assert found.queries.shape == (2, HEADS, 16, DIM)
    assert found.keys.shape == (2, KV_HEADS, 16, DIM)
    for number, layer in enumerate(layers):
        weights = {side: getattr(layer, f"{side}_proj").weight.detach().double().numpy() for side in "qk"}
        for token in range(6):
            state = inputs[number][0, token].detach().double().numpy()
            query = [rotate(part, token) for part in (weights["q"] @ state).reshape(HEADS, DIM)]
            key = [rotate(part, token) for part in (weights["k"] @ state).reshape(KV_HEADS, DIM)]
            for place in (token, 6 + token):
                np.testing.assert_allclose(found.queries[number, :, place], query, atol=1e-5)
                np.testing.assert_allclose(found.keys[number, :, place], key, atol=1e-5)
    assert "".join(found.tokens) == "abcdefabcdefcdef"
    assert found.positions == (*range(6), *range(6), *range(4))
    assert found.sequences == (0,) * 6 + (1,) * 6 + (2,) * 4
    assert found.scalings == (pytest.approx(DIM**-0.5),) * 2
    found.save(tmp_path / "out")
    tensors, labels = (
        load_file(tmp_path / "out" / "vectors.safetensors"),
        json.loads((tmp_path / "out/tokens.json").read_text()),
    )
    assert torch.equal(tensors["queries"], found.queries)
    assert labels["sequences"] == list(found.sequences)
    assert labels["base"]["model_type"] == "llama"


def test_what_is_refused() -> None:
    model, t5 = tiny_llama(), FAMILIES["t5"]
    with pytest.raises(ValueError, match="text of every token of sequence 1"):
        bertviz_inputs(model, INPUTS, TEXTS[1][:3], row=1)
    with pytest.raises(ValueError, match="choose the self-attention of one"):
        bertviz_inputs(t5.make(), t5.inputs(), TEXTS[0])
    with pytest.raises(ValueError, match="There is no data"):
        queries_and_keys(model, [], [])
    with pytest.raises(ValueError, match="Expected 2 texts of 6 tokens"):
        queries_and_keys(model, [INPUTS], [[TEXTS[0], TEXTS[1][:4]]])
