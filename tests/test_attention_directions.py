"""Directions of attention against whole E x E matrices and their singular vectors by numpy, token by token."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from patchattn.inspection.attention_directions import attention_directions

from .reference import DIM, HEADS, KV_HEADS, WIDTH, rotate, tiny_llama
from .test_head_functions import centred, gpt2, llama

IDS = [3, 7, 1, 9, 22, 5, 17, 4]
LAYER = 1


def states(model: Any, modules: dict[str, Any]) -> dict[str, np.ndarray]:
    """What modules got and gave for the text."""
    found: dict[str, np.ndarray] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            found[f"{name}.in"], found[f"{name}.out"] = args[0][0].numpy(), output[0].numpy()

        return hook

    handles = [module.register_forward_hook(keep(name), with_kwargs=True) for name, module in modules.items()]
    with torch.no_grad():
        model(torch.tensor([IDS]))
    for handle in handles:
        handle.remove()
    return found


def by_hand(model: Any, head: int, query: int, key: int) -> dict[str, Any]:
    """The matrix between the two tokens, the layer's input, and what earlier heads write into it."""
    group, own = head * KV_HEADS // HEADS, slice(head * DIM, (head + 1) * DIM)
    with torch.no_grad():
        if isinstance(model, tf.LlamaForCausalLM):
            block, first = model.model.layers[LAYER], model.model.layers[0]
            found = states(model, {"norm": block.input_layernorm, "out": first.self_attn.o_proj})
            gain, subtract = block.input_layernorm.weight.numpy(), lambda rows: rows
            q = block.self_attn.q_proj.weight[own].numpy()
            k = block.self_attn.k_proj.weight[group * DIM : (group + 1) * DIM].numpy()
            q, k = (np.array([rotate(column, at) for column in w.T]).T for w, at in ((q, query), (k, key)))
            q, k = (np.concatenate([w, np.zeros((DIM, 1))], axis=1) for w in (q, k))
            written = first.self_attn.o_proj.weight.numpy()
            residual = found["norm.in"]
            size = np.sqrt((residual**2).mean(-1) + model.config.rms_norm_eps)
        else:
            block, first = model.transformer.h[LAYER], model.transformer.h[0]
            found = states(model, {"norm": block.ln_1, "out": first.attn.c_proj})
            gain, subtract = block.ln_1.weight.numpy(), centred
            weight, bias = block.attn.c_attn.weight.numpy().T, block.attn.c_attn.bias.numpy()
            weight = np.concatenate([weight, bias[:, None]], axis=1)
            q, k = weight[:WIDTH][own], weight[WIDTH : 2 * WIDTH][own]
            written = first.attn.c_proj.weight.numpy().T
            residual = found["norm.in"]
            size = np.sqrt(residual.var(-1) + model.config.layer_norm_epsilon)
    x = np.concatenate([found["norm.out"], np.ones((len(IDS), 1))], axis=1)
    heads = found["out.in"].reshape(len(IDS), HEADS, DIM)
    adds = {
        (0, other): gain * subtract(heads[:, other] @ written[:, other * DIM : (other + 1) * DIM].T) / size[:, None]
        for other in range(HEADS)
    }
    return {"matrix": q.T @ k / np.sqrt(DIM), "x": x, "adds": adds}


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize(("head", "query", "key"), [(0, 6, 2), (3, 4, 0), (2, 7, 7), (1, 5, 3), (0, 3, 1)])
def test_terms_and_writers_by_hand(make: Any, head: int, query: int, key: int) -> None:
    model = make()
    hand = by_hand(model, head, query, key)
    x, matrix = hand["x"], hand["matrix"]
    logit = x[query] @ matrix @ x[key]
    how: Any = {"layer": LAYER, "head": head, "query": query, "key": key, "share": 0.8}
    if logit <= 0:
        with pytest.raises(ValueError, match="there is no share of what is not above 0"):
            attention_directions(model, IDS, **how)
        return
    found = attention_directions(model, IDS, **how)
    assert found.logit == pytest.approx(logit, rel=1e-5)
    u, sizes, v = np.linalg.svd(matrix)
    terms = np.array([sizes[k] * (x[query] @ u[:, k]) * (x[key] @ v[k]) for k in range(DIM)])
    np.testing.assert_allclose(found.terms, terms, rtol=1e-3, atol=1e-5 * abs(terms).max())
    assert float(found.terms.sum()) == pytest.approx(logit, rel=1e-5)
    used = list(found.used)
    assert terms[used].sum() >= 0.8 * logit * (1 - 1e-6)
    assert len(used) == 1 or terms[used].sum() - terms[used].min() < 0.8 * logit
    assert min(terms[used]) >= max(np.delete(terms, used), default=-np.inf)
    part = u[:-1, used] * sizes[used] @ v[used]  # (E, E + 1)
    other = u[:, used] * sizes[used] @ v[used][:, :-1]
    for place, added in hand["adds"].items():
        size = abs(terms).max()
        assert found.query_writers[place] == pytest.approx(added[query] @ part @ x[key], rel=1e-3, abs=1e-4 * size)
        assert found.key_writers[place] == pytest.approx(x[query] @ other @ added[key], rel=1e-3, abs=1e-4 * size)
    (side, layer, writer, most), *_ = found.strongest(3)
    values = found.query_writers if side == "query" else found.key_writers
    assert values[layer, writer] == most == max([*found.query_writers.values(), *found.key_writers.values()])


def test_some_pairs_have_a_logit_above_zero() -> None:
    """So that the test above tests something: of both models."""
    for make in (llama, gpt2):
        logits = []
        for head, query, key in ((0, 6, 2), (3, 4, 0), (2, 7, 7), (1, 5, 3), (0, 3, 1)):
            hand = by_hand(make(), head, query, key)
            logits.append(hand["x"][query] @ hand["matrix"] @ hand["x"][key] > 0)
        assert sum(logits) >= 2


def test_what_is_not_decomposed() -> None:
    sizes: Any = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 50, "head_dim": 8}
    how: Any = {"layer": 1, "head": 0, "query": 3, "key": 1}
    torch.manual_seed(0)
    normed = tf.Qwen3ForCausalLM(tf.Qwen3Config(**sizes)).eval()  # queries and keys are normalised
    with pytest.raises(NotImplementedError, match="is not what its weights and positions make"):
        attention_directions(normed, IDS, **how)
    model = tiny_llama(num_hidden_layers=2)
    for wrong, message in (
        ({"layer": 2}, "no head 0 of layer 2"),
        ({"head": 4}, "no head 4 of layer 1"),
        ({"key": 5}, "not behind it, of 8, got 3 and 5"),
        ({"share": 0.0}, "share is above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_directions(model, IDS, **{**how, **wrong})
    with pytest.raises(ValueError, match="ids from 0 to 49, got 50"):
        attention_directions(model, [50, *IDS], **how)
    with pytest.raises(TypeError, match=r"told by numbers, got 3\.0"):
        attention_directions(model, IDS, **{**how, "query": 3.0})
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        attention_directions(model.train(), IDS, **how)
