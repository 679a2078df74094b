"""Projections that make queries, keys and values at once: cut where their layout is known, refused where it is not."""

import copy

import pytest
import torch
from transformers import (
    CodeGenConfig,
    CodeGenForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
)

import patchattn

SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32}
NEO_X = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
IDS = torch.arange(12)[None]


def removed(model: PreTrainedModel, output: str) -> torch.Tensor:
    """Logits without head 1 of the first layer, by zeroing what the output projection reads of it."""
    model = copy.deepcopy(model)
    weight = model.get_parameter(f"{output}.weight").data
    inputs = weight if "c_proj" in output and isinstance(model, GPT2LMHeadModel) else weight.T  # Conv1D: inputs first
    inputs[8:16] = 0
    return model(IDS).logits


@pytest.mark.parametrize(
    ("make", "output"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(**SIZES)), "transformer.h.0.attn.c_proj"),
        (lambda: GPTBigCodeForCausalLM(GPTBigCodeConfig(**SIZES)), "transformer.h.0.attn.c_proj"),
        (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**NEO_X)), "gpt_neox.layers.0.attention.dense"),
    ],
    ids=["blocks", "multi-query", "by head"],
)
@torch.no_grad()
def test_a_known_layout_is_cut(make, output):
    model = make().double().eval()
    expected = removed(model, output)
    assert not torch.allclose(expected, model(IDS).logits, atol=1e-6)
    patchattn.patch_model(model, "prune", heads={0: [1]})
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: CodeGenForCausalLM(CodeGenConfig(**SIZES, rotary_dim=4)),  # four groups of heads
        lambda: GPTBigCodeForCausalLM(GPTBigCodeConfig(**SIZES, multi_query=False)),  # query, key, value of each head
    ],
    ids=["codegen", "gpt_bigcode"],
)
def test_an_unknown_layout_is_refused(make):
    model = make().eval()
    if not patchattn.find_sites(model):
        pytest.skip("this family does not dispatch in the installed transformers")
    before = model(IDS).logits
    with pytest.raises(NotImplementedError, match=r"how .* lays out queries, keys and values is not known"):
        patchattn.patch_model(model, "prune", heads={0: [1]})
    assert torch.equal(model(IDS).logits, before)
    patchattn.patch_model(model, "prune", heads={0: [1]}, physical=False)  # masked, where no layout is needed
    assert not torch.allclose(model(IDS).logits, before, atol=1e-4)
