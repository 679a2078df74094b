"""LogN scaling against its formula (Qwen, arXiv 2309.16609), computed independently in numpy."""

import math

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, Gemma3TextConfig, Gemma3TextModel

import patchattn

from .families import FAMILIES, outputs
from .reference import attend, layer_in_and_out, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13]])


def test_logits_follow_the_formula() -> None:
    model = patchattn.patch_model(tiny_llama(), "logn", train_length=3)
    inputs, got = layer_in_and_out(model, TOKENS)

    def scale(stream: str, x: np.ndarray, n: int) -> float:
        return math.log(n, 3) if stream == "query" and n > 3 else 1.0

    want = attend(model.model.layers[0].self_attn, inputs[0], scale=scale)
    np.testing.assert_allclose(got[0], want, rtol=1e-5, atol=1e-7)


def test_nothing_changes_up_to_the_trained_length() -> None:
    model = tiny_llama(max_position_embeddings=5)
    before = outputs(model, input_ids=TOKENS)[0]
    patchattn.patch_model(model, "logn")  # the length is the configuration's
    after = outputs(model, input_ids=TOKENS)[0]
    assert torch.equal(after[:, :5], before[:, :5])
    assert not torch.allclose(after[:, 5:], before[:, 5:])
    assert not list(model.model.layers[0].self_attn.patchattn.parameters())


def rescaled(**rope: object) -> torch.nn.Module:
    return tiny_llama(max_position_embeddings=64, rope_parameters={"rope_theta": 10000.0, **rope})


@pytest.mark.parametrize(
    ("model", "length"),
    [
        (tiny_llama(max_position_embeddings=77), 77),
        (rescaled(rope_type="yarn", factor=4.0, original_max_position_embeddings=16), 16),
        (
            BertModel(
                BertConfig(num_hidden_layers=1, hidden_size=12, intermediate_size=12, max_position_embeddings=40)
            ),
            40,
        ),
        (FAMILIES["gpt2"].make(), 64),  # its configuration calls it n_positions
        (
            Gemma3TextModel(Gemma3TextConfig(num_hidden_layers=1, hidden_size=8, vocab_size=8, intermediate_size=8)),
            131072,
        ),
        (FAMILIES["vit"].make(), None),
        (FAMILIES["t5"].make(), None),
    ],
    ids=["llama", "yarn", "bert", "gpt2", "gemma3", "vit", "t5"],
)
def test_the_trained_length_of_a_model(model: torch.nn.Module, length: int | None) -> None:
    assert {site.max_positions for site in patchattn.find_sites(model)} == {length}


def test_rotary_parameters_per_kind_of_layer() -> None:
    rope = {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "vocab_size": 8, "intermediate_size": 8}
    kinds = {"full_attention": rope, "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"}}
    config = Gemma3TextConfig(**sizes, max_position_embeddings=32, rope_parameters=kinds)
    assert patchattn.find_sites(Gemma3TextModel(config))[0].max_positions == 8


def test_a_model_without_a_stated_length_needs_one() -> None:
    model = FAMILIES["vit"].make()
    with pytest.raises(ValueError, match=r"cannot tell the length that ViTAttention .* give train_length"):
        patchattn.patch_model(model, "logn")
    patchattn.patch_model(model, "logn", train_length=4)


def test_bad_lengths_are_named() -> None:
    with pytest.raises(ValueError, match="train_length must lie between 2"):
        patchattn.patch_model(tiny_llama(), "logn", train_length=1)
