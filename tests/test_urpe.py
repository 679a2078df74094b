"""URPE against loops in numpy, with padding, in chunks of rows, in steps, and at its start."""

import numpy as np
import pytest
import torch
import transformers as tf

import patchattn
from patchattn.softmax import rows

from .reference import DIM, HEADS, KV_HEADS, layer_in_and_out, rotate, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13], [2, 8, 8, 1, 30, 4, 6]])
SPAN = 3


def learned(model):
    patchattn.patch_model(model, "urpe", span=SPAN)
    torch.manual_seed(1)
    tables = [p for name, p in model.named_parameters() if name.endswith("urpe.table")]
    with torch.no_grad():
        for table in tables:
            table.normal_()
    return model, tables[0]


@pytest.mark.parametrize("entries", [rows._ENTRIES, 64])
@torch.no_grad()
def test_weights_are_multiplied_by_the_number_of_their_distance(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_ENTRIES", entries)
    model, table = learned(tiny_llama())
    assert table.shape == (HEADS, 2 * SPAN - 1)
    attention = model.model.layers[0].self_attn
    weights = {name: getattr(attention, f"{name}_proj").weight.numpy() for name in "qkvo"}
    inputs, got = layer_in_and_out(model, TOKENS)
    for text, given in zip(inputs, got, strict=True):
        for row in range(len(text)):
            heads = []
            for head in range(HEADS):
                group = head * KV_HEADS // HEADS
                query = rotate((weights["q"] @ text[row]).reshape(HEADS, DIM)[head], row)
                keys = [rotate((weights["k"] @ x).reshape(KV_HEADS, DIM)[group], j) for j, x in enumerate(text)]
                raised = np.exp([query @ key / np.sqrt(DIM) for key in keys[: row + 1]])
                values = np.array([(weights["v"] @ x).reshape(KV_HEADS, DIM)[group] for x in text[: row + 1]])
                factors = [float(table[head, SPAN - 1 + min(row - j, SPAN - 1)]) for j in range(row + 1)]
                heads.append((raised / raised.sum() * factors) @ values)
            np.testing.assert_allclose(given[row], weights["o"] @ np.concatenate(heads), rtol=0, atol=1e-8)


@torch.no_grad()
def test_an_encoder_looks_both_ways() -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 1}
    torch.manual_seed(0)
    config = tf.BertConfig(**sizes, vocab_size=50)
    config._attn_implementation = "eager"
    model = tf.BertModel(config).double().eval()
    plain = model(TOKENS, output_attentions=True).attentions[0]
    model, table = learned(model)
    got = model(TOKENS, output_attentions=True).attentions[0]
    for i in range(TOKENS.shape[1]):
        for j in range(TOKENS.shape[1]):
            factor = table[:, SPAN - 1 + max(1 - SPAN, min(i - j, SPAN - 1))]
            torch.testing.assert_close(got[:, :, i, j], plain[:, :, i, j] * factor, rtol=0, atol=1e-6)


@torch.no_grad()
def test_padding_on_the_left_and_steps() -> None:
    model, _ = learned(tiny_llama())
    want = model(TOKENS[:1]).logits[0, -1]
    padded = torch.cat([torch.full((1, 3), 4), TOKENS[:1]], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * TOKENS.shape[1]])
    cache = model(padded[:, :-1], attention_mask=mask[:, :-1]).past_key_values
    got = model(padded[:, -1:], attention_mask=mask, past_key_values=cache).logits[0, -1]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_it_starts_at_the_model_and_learns_at_once() -> None:
    model = tiny_llama()
    before = model(TOKENS).logits
    patchattn.patch_model(model, "urpe", span=SPAN)
    torch.testing.assert_close(model(TOKENS).logits, before, rtol=0, atol=1e-10)
    model(TOKENS).logits.square().sum().backward()
    gradient = model.model.layers[0].self_attn.patchattn.urpe.table.grad
    assert gradient[:, SPAN - 1 :].abs().min() > 0
    assert not gradient[:, : SPAN - 1].any()  # of tokens ahead, which no row sees
