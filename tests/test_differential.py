"""Differential attention against loops in numpy, against DiffLlama, and at its start."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn

import patchattn

from .families import outputs
from .reference import DIM, HEADS, KV_HEADS, WIDTH, layer_in_and_out, rotate, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13], [2, 8, 8, 1, 30, 4, 6]])
GROUP = HEADS // KV_HEADS


def probabilities(weights: dict[str, np.ndarray], inputs: np.ndarray, head: int, row: int) -> np.ndarray:
    """Of one row `(T, E)` and head, over the keys up to it."""
    query = rotate((weights["q"] @ inputs[row]).reshape(HEADS, DIM)[head], row)
    keys = [
        rotate((weights["k"] @ x).reshape(KV_HEADS, DIM)[head // GROUP], column)
        for column, x in enumerate(inputs[: row + 1])
    ]
    logits = np.array([query @ key / np.sqrt(DIM) for key in keys])
    raised = np.exp(logits - logits.max())
    return raised / raised.sum()


@torch.no_grad()
def test_every_head_is_a_difference_of_two() -> None:
    model = patchattn.patch_model(tiny_llama(), "differential")
    attention = model.model.layers[0].self_attn
    factors = torch.tensor([0.3, -0.5, 1.2, 0.7], dtype=torch.float64)
    attention.patchattn.differential.factor.copy_(factors)
    weights = {name: getattr(attention, f"{name}_proj").weight.numpy() for name in "qkvo"}
    inputs, got = layer_in_and_out(model, TOKENS)
    for text, given in zip(inputs, got, strict=True):
        for row in range(len(text)):
            heads = []
            for head in range(HEADS):
                other = (head + HEADS // 2) % HEADS
                mixed = probabilities(weights, text, head, row)
                mixed = mixed - float(factors[head]) * probabilities(weights, text, other, row)
                values = np.array([(weights["v"] @ x).reshape(KV_HEADS, DIM)[head // GROUP] for x in text[: row + 1]])
                heads.append(mixed @ values)
            np.testing.assert_allclose(given[row], weights["o"] @ np.concatenate(heads), rtol=0, atol=1e-8)


def test_weights_are_differences() -> None:
    model = tiny_llama()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        plain = model(TOKENS, output_attentions=True).attentions[0]
        patchattn.patch_model(model, "differential", initial_lambda=0.25)
        got = model(TOKENS, output_attentions=True).attentions[0]
    torch.testing.assert_close(got, plain - 0.25 * plain[:, [2, 3, 0, 1]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [2, 4])
@torch.no_grad()
def test_a_llama_with_the_weights_of_diffllama_gives_what_it_gives(kv_heads: int) -> None:
    """But for DiffLlama's norm of pairs, which is taken out of it.

    The second head of a pair in DiffLlama is, divided by -lambda, the second head here with 1 / lambda.
    """
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": kv_heads,
        "head_dim": DIM,
        "rms_norm_eps": 1e-6,
    }
    native = tf.DiffLlamaForCausalLM(tf.DiffLlamaConfig(**sizes)).double().eval()
    for parameter in native.parameters():
        parameter.normal_(std=0.2)
    theirs = native.model.layers[0].self_attn
    theirs.groupnorm = nn.Identity()
    rate = float(
        (theirs.lambda_q1 @ theirs.lambda_k1).exp() - (theirs.lambda_q2 @ theirs.lambda_k2).exp() + theirs.lambda_init
    )
    sibling = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)).double().eval()
    assert not sibling.load_state_dict(native.state_dict(), strict=False).missing_keys
    patchattn.patch_model(sibling, "differential")
    ours = sibling.model.layers[0].self_attn
    half = HEADS // 2
    ours.patchattn.differential.factor.copy_(torch.tensor([rate] * half + [1 / rate] * half))
    # Theirs lie in pairs: (first, second) of the first pair, then of the second one.
    columns = theirs.o_proj.weight.view(WIDTH, half, 2, DIM).transpose(1, 2) * (1 - theirs.lambda_init)
    columns[:, 1] *= -rate
    ours.o_proj.weight.copy_(columns.reshape(WIDTH, -1))
    got, want = (outputs(model, input_ids=TOKENS)[0] for model in (sibling, native))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_it_starts_at_the_model_and_learns_at_once() -> None:
    model = tiny_llama()
    before = model(TOKENS).logits
    patchattn.patch_model(model, "differential")
    assert torch.equal(model(TOKENS).logits, before)
    model(TOKENS).logits.square().sum().backward()
    assert model.model.layers[0].self_attn.patchattn.differential.factor.grad.abs().min() > 0


def test_one_kv_head_has_no_other() -> None:
    with pytest.raises(NotImplementedError, match="4 query heads on 1 kv heads"):
        patchattn.patch_model(tiny_llama(num_key_value_heads=1), "differential")
