"""Talking heads against loops in numpy, against DeBERTa's, at their start, and with padding."""

import numpy as np
import torch
import transformers as tf
from transformers.models.deberta.modeling_deberta import DisentangledSelfAttention

import patchattn

from .reference import DIM, HEADS, KV_HEADS, WIDTH, layer_in_and_out, rotate, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13], [2, 8, 8, 1, 30, 4, 6]])


def mixed(model, path: str):
    """The variant of an attention module, with matrices far from the identity."""
    variant = model.get_submodule(f"{path}.patchattn.talking_heads")
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in variant.parameters():
            parameter.normal_(std=0.6)
    return variant


@torch.no_grad()
def test_rows_are_mixed_before_and_after_the_softmax() -> None:
    model = patchattn.patch_model(tiny_llama(), "talking_heads")
    variant = mixed(model, "model.layers.0.self_attn")
    attention = model.model.layers[0].self_attn
    weights = {name: getattr(attention, f"{name}_proj").weight.numpy() for name in "qkvo"}
    before, after = (matrix.numpy() for matrix in (variant.of_logits, variant.of_weights))
    inputs, got = layer_in_and_out(model, TOKENS)
    for text, given in zip(inputs, got, strict=True):
        for row in range(len(text)):
            logits = np.empty((HEADS, row + 1))
            for head in range(HEADS):
                query = rotate((weights["q"] @ text[row]).reshape(HEADS, DIM)[head], row)
                for column in range(row + 1):
                    key = (weights["k"] @ text[column]).reshape(KV_HEADS, DIM)[head * KV_HEADS // HEADS]
                    logits[head, column] = query @ rotate(key, column) / np.sqrt(DIM)
            raised = np.exp(before @ logits)
            rows = after @ (raised / raised.sum(1, keepdims=True))
            values = np.array([(weights["v"] @ x).reshape(KV_HEADS, DIM) for x in text[: row + 1]])
            heads = [rows[head] @ values[:, head * KV_HEADS // HEADS] for head in range(HEADS)]
            np.testing.assert_allclose(given[row], weights["o"] @ np.concatenate(heads), rtol=0, atol=1e-8)


@torch.no_grad()
def test_a_bert_with_the_weights_of_debertas_talking_heads_gives_what_they_give() -> None:
    config = tf.DebertaConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, talking_head=True, relative_attention=False, pos_att_type=None
    )
    torch.manual_seed(0)
    native = DisentangledSelfAttention(config).double().eval()
    for parameter in native.parameters():
        parameter.normal_(std=0.5)
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": 32, "num_hidden_layers": 1}
    model = patchattn.patch_model(tf.BertModel(tf.BertConfig(**sizes, vocab_size=50)).double().eval(), "talking_heads")
    ours = model.encoder.layer[0].attention.self
    each = native.in_proj.weight.view(HEADS, 3, DIM, WIDTH)
    for number, name in enumerate(("query", "key", "value")):
        layer = getattr(ours, name)
        layer.weight.copy_(each[:, number].reshape(-1, WIDTH))
        layer.bias.copy_({"query": native.q_bias, "value": native.v_bias}.get(name, torch.zeros(WIDTH)))
    variant = ours.patchattn.talking_heads
    variant.of_logits.copy_(native.head_logits_proj.weight)
    variant.of_weights.copy_(native.head_weights_proj.weight)
    states = torch.randn(2, 6, WIDTH, dtype=torch.float64)
    real = torch.ones(2, 6, dtype=torch.bool)
    real[1, 4:] = False
    want = native(states, real[:, None, None])[0]
    got = ours(states, attention_mask=real[:, None, None].expand(-1, -1, 6, -1))[0]
    torch.testing.assert_close(got[real], want[real], rtol=0, atol=1e-6)


def test_it_starts_at_the_model_and_learns_at_once() -> None:
    model = tiny_llama()
    before = model(TOKENS).logits
    patchattn.patch_model(model, "talking_heads")
    torch.testing.assert_close(model(TOKENS).logits, before, rtol=0, atol=1e-8)
    model(TOKENS).logits.square().sum().backward()
    for name, parameter in model.model.layers[0].self_attn.patchattn.talking_heads.named_parameters():
        assert parameter.grad.abs().min() > 0, name


@torch.no_grad()
def test_padding_on_the_left_and_steps() -> None:
    model = patchattn.patch_model(tiny_llama(), "talking_heads")
    mixed(model, "model.layers.0.self_attn")
    want = model(TOKENS[:1]).logits[0]
    padded = torch.cat([torch.full((1, 3), 4), TOKENS[:1]], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * TOKENS.shape[1]])
    cache = model(padded[:, :-1], attention_mask=mask[:, :-1]).past_key_values
    got = model(padded[:, -1:], attention_mask=mask, past_key_values=cache).logits[0, -1]
    torch.testing.assert_close(got, want[-1], rtol=0, atol=1e-6)
