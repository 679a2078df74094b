"""MAPS by hand: norms folded into weights in float64, head by head, of a Llama with grouped queries and a GPT-2."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from patchattn.inspection.head_functions import relation_salience, relation_scores

from .reference import DIM, HEADS, KV_HEADS, WIDTH, tiny_llama

PAIRS = [(3, 7), (9, 22), (11, 5), (30, 41), (8, 2), (17, 17)]


def llama() -> Any:
    model = tiny_llama(num_hidden_layers=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(len(name)))
    return model


def gpt2() -> Any:
    torch.manual_seed(0)
    config = tf.GPT2Config(vocab_size=50, n_positions=16, n_embd=WIDTH, n_layer=2, n_head=HEADS, initializer_range=0.3)
    model = tf.GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(len(name)))
    return model


def centred(rows: np.ndarray) -> np.ndarray:
    return rows - rows.mean(-1, keepdims=True)


def rows_of(model: Any, layer: int, head: int, sources: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of M of one head, and what it writes over what it reads."""
    group, own = head * KV_HEADS // HEADS, slice(head * DIM, (head + 1) * DIM)
    embedded = model.get_input_embeddings().weight[sources]
    with torch.no_grad():
        if isinstance(model, tf.LlamaForCausalLM):
            of, block, final = model.model.layers[0], model.model.layers[layer], model.model.norm.weight.numpy()
            x = embedded if layer == 0 else of.mlp(of.post_attention_layernorm(embedded))
            gain, subtract = block.input_layernorm.weight.numpy(), lambda rows: rows
            value = block.self_attn.v_proj.weight[group * DIM : (group + 1) * DIM].numpy()
            output = block.self_attn.o_proj.weight[:, own].numpy()
        else:
            of, block, final = model.transformer.h[0], model.transformer.h[layer], model.transformer.ln_f.weight.numpy()
            x = embedded if layer == 0 else of.mlp(of.ln_2(embedded))
            gain, subtract = block.ln_1.weight.numpy(), centred
            value = block.attn.c_attn.weight[:, 2 * WIDTH :][:, own].numpy().T
            output = block.attn.c_proj.weight[own].numpy().T
        x = x.detach().numpy()
        unembedding = model.lm_head.weight.detach().numpy()
    written = (subtract(x) * gain) @ value.T @ output.T
    salience = np.linalg.norm(written, axis=-1) / np.linalg.norm(x, axis=-1)
    return (subtract(written) * final) @ unembedding.T, salience


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize(("top", "suppress"), [(1, False), (10, False), (10, True)])
def test_scores_are_those_of_folded_weights(make: Any, top: int, suppress: bool) -> None:
    model = make()
    found = relation_scores(model, PAIRS, top=top, suppress=suppress)
    salience = relation_salience(model, [source for source, _ in PAIRS])
    some = 0.0
    for layer, (scores, strong) in enumerate(zip(found.scores.values(), salience.scores.values(), strict=True)):
        for head in range(HEADS):
            rows, sizes = rows_of(model, layer, head, [source for source, _ in PAIRS])
            rows = -rows if suppress else rows
            best = [np.argsort(-row)[:top] for row in rows]
            want = np.mean([target in some for (_, target), some in zip(PAIRS, best, strict=True)])
            assert scores[head] == pytest.approx(want), (layer, head)
            assert strong[head] == pytest.approx(sizes.mean(), rel=1e-6)
            some += want
    assert top == 1 or some > 0
    assert found.settings == {"top": top, "suppress": suppress, "pairs": len(PAIRS)}


def test_a_head_that_writes_what_it_reads_copies() -> None:
    """The identity between embedding and unembedding, so that every token is its own likeliest."""
    model = tiny_llama(num_key_value_heads=HEADS, tie_word_embeddings=True)
    with torch.no_grad():
        module = model.model.layers[0].self_attn
        basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64)).Q
        module.v_proj.weight[:DIM] = basis[:DIM]
        module.o_proj.weight[:, :DIM] = basis[:DIM].T  # together a projection, onto a part of the space
        table = torch.randn(50, WIDTH, dtype=torch.float64) @ basis[:DIM].T @ basis[:DIM]  # in which embeddings lie
        model.get_input_embeddings().weight.copy_(table / table.norm(dim=-1, keepdim=True))
    same = [(token, token) for token in range(50)]
    assert relation_scores(model, same, top=1).scores["model.layers.0.self_attn"][0] == 1.0
    assert relation_scores(model, same, top=1, suppress=True).scores["model.layers.0.self_attn"][0] == 0.0


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "head_dim": 8,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tf.Gemma2Config(**SMALL), "changes what .* writes before it is added"),
        (tf.Olmo2Config(**{k: v for k, v in SMALL.items() if k != "head_dim"}), "is not normalised in its layer"),
        (
            tf.GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1),
            "has sinks in its softmax",
        ),
        (
            tf.ModernBertDecoderConfig(
                **{k: v for k, v in SMALL.items() if k not in ("head_dim", "num_key_value_heads")}
            ),
            "is not normalised in its layer|gets something else than embeddings",
        ),
    ],
)
def test_a_model_whose_weights_do_not_say_it_is_refused(config: Any, message: str) -> None:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 2.0)
    with pytest.raises(NotImplementedError, match=message):
        relation_scores(model, PAIRS)


def test_what_attention_does_beside_its_projections_is_refused() -> None:
    model = tiny_llama()
    handle = model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda module, args, output: 1.01 * output)
    with pytest.raises(NotImplementedError, match="something else of one token than its projections alone"):
        relation_scores(model, PAIRS)
    handle.remove()
    relation_scores(model, PAIRS)


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        relation_scores(tiny_llama().train(), PAIRS)
    with pytest.raises(ValueError, match="ids from 0 to 49, got 3 to 50"):
        relation_scores(tiny_llama(), [(3, 50)])
    with pytest.raises(ValueError, match="at least one pair"):
        relation_scores(tiny_llama(), [])
    for wrong in ((3, 4, 5), (1.5, 2), "ab"):
        with pytest.raises(TypeError, match="pairs of ids of tokens"):
            relation_scores(tiny_llama(), [wrong])
    with pytest.raises(ValueError, match="from 1 to 50, got 51"):
        relation_scores(tiny_llama(), PAIRS, top=51)
    encoder = tf.BertModel(tf.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=50))
    with pytest.raises(NotImplementedError, match="no decoder with an output embedding"):
        relation_scores(encoder.eval(), PAIRS)
