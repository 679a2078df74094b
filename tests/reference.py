"""Attention of one Llama layer in float64, token by token and head by head, from its weights alone."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers as tf
from torch import nn

HEADS, KV_HEADS, DIM, WIDTH, THETA = 4, 2, 8, 32, 10000.0


def tiny_llama(seed: int = 0, **extra: Any) -> nn.Module:
    """A Llama whose attention the functions below can follow; float64."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 50, "head_dim": DIM}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**{**sizes, **heads, **extra}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    return model.double().eval()


def layer_in_and_out(model: nn.Module, tokens: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What the first attention module got and gave, `(B, T, E)` each."""
    seen: dict[str, torch.Tensor] = {}
    module = model.model.layers[0].self_attn

    def keep(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen.update(inp=kwargs["hidden_states"], out=output[0])

    handle = module.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(tokens)
    handle.remove()
    return seen["inp"].numpy(), seen["out"].numpy()


def rotate(vector: np.ndarray, position: int) -> np.ndarray:
    """Rotary embedding of one head's vector: pairs (i, i + D/2) turned by position / theta^(2i/D)."""
    half = DIM // 2
    angles = position / THETA ** (2 * np.arange(half) / DIM)
    first, second = vector[:half], vector[half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin])


def attend(
    module: nn.Module,
    inputs: np.ndarray,
    scale: Callable[[str, np.ndarray, int], float] = lambda stream, x, n: 1.0,
    gate: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda x, queries: np.ones(HEADS),
) -> np.ndarray:
    """Causal attention of one sequence `(T, E)`, with a scale per stream and token and a gate per token and head."""
    weights = {name: getattr(module, f"{name}_proj").weight.detach().numpy() for name in "qkvo"}
    outputs = []
    for row, x in enumerate(inputs):
        queries = (weights["q"] @ x).reshape(HEADS, DIM)
        gates = gate(x, queries)
        heads = []
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            query = rotate(queries[head], row) * scale("query", x, row + 1)
            logits, values = [], []
            for column, y in enumerate(inputs[: row + 1]):
                key = rotate((weights["k"] @ y).reshape(KV_HEADS, DIM)[group], column) * scale("key", y, column + 1)
                logits.append(query @ key / np.sqrt(DIM))
                values.append((weights["v"] @ y).reshape(KV_HEADS, DIM)[group] * scale("value", y, column + 1))
            probabilities = np.exp(np.array(logits) - max(logits))
            heads.append(gates[head] * (probabilities / probabilities.sum()) @ np.array(values))
        outputs.append(weights["o"] @ np.concatenate(heads))
    return np.array(outputs)
