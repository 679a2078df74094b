"""SHRP's layers in float64, token by token and head by head, from their weights alone; for BERT's kind and for ViT."""

import math
from typing import Any

import numpy as np
import torch
from torch import nn

import patchattn

from .families import FAMILIES

HEADS, DIM, WIDTH = 4, 8, 32
ENCODERS = ["bert", "roberta", "electra", "vit"]
TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13], [4, 4, 8, 30, 2, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])

ERF = np.vectorize(math.erf)


def encoder(family: str) -> nn.Module:
    """A small model whose embeddings, norms and biases are all of some size; float64."""
    model = FAMILIES[family].make()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double().eval()


def inputs(family: str) -> dict[str, torch.Tensor]:
    if family == "vit":
        return {"pixel_values": FAMILIES["vit"].inputs()["pixel_values"].double()}
    return {"input_ids": TOKENS, "attention_mask": MASK}


def layers(model: nn.Module) -> Any:
    body = getattr(model, model.base_model_prefix)
    return body.layers if hasattr(body, "layers") else body.encoder.layer


def attention(model: nn.Module, layer: int = 0) -> Any:
    found = [m for m in layers(model)[layer].modules() if hasattr(m, "query") or hasattr(m, "q_proj")]
    return found[0]


def shrp(model: nn.Module, layer: int = 0) -> Any:
    return attention(model, layer).patchattn.shrp


def in_and_out(model: nn.Module, family: str, layer: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """What a layer gets and gives, `(B, T, E)`."""
    seen: dict[str, Any] = {}
    hook = layers(model)[layer].register_forward_hook(lambda m, args, out: seen.update(i=args[0], o=out))
    with torch.no_grad():
        model(**inputs(family))
    hook.remove()
    output = seen["o"][0] if isinstance(seen["o"], tuple) else seen["o"]
    return seen["i"].numpy(), output.numpy()


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def norm(values: np.ndarray, module: nn.Module) -> np.ndarray:
    centred = values - values.mean(-1, keepdims=True)
    scaled = centred / np.sqrt(values.var(-1, keepdims=True) + module.eps)
    return scaled * module.weight.detach().numpy() + module.bias.detach().numpy()


def linear(values: np.ndarray, weight: Any, bias: Any) -> np.ndarray:
    return values @ weight.detach().numpy().T + bias.detach().numpy()


def reference(plain: nn.Module, family: str, x: np.ndarray, expander: dict[str, Any], choose: Any) -> np.ndarray:
    """A converted layer, token by token, from the weights of the unpatched model and the expander's."""
    layer, module = layers(plain)[0], attention(plain)
    is_bert = family != "vit"
    normed = x if is_bert else norm(x, layer.layernorm_before)
    names = ("query", "key", "value") if is_bert else ("q_proj", "k_proj", "v_proj")
    query, key, value = (
        linear(normed, getattr(module, name).weight, getattr(module, name).bias).reshape(*x.shape[:2], HEADS, DIM)
        for name in names
    )
    result = np.empty_like(x)
    for row in range(len(x)):
        real = MASK[row].numpy().astype(bool) if is_bert else np.ones(x.shape[1], bool)
        for token in range(x.shape[1]):
            heads = []
            for head in range(HEADS):
                attended = softmax(key[row, real, head] @ query[row, token, head] / math.sqrt(DIM))
                heads.append(attended @ value[row, real, head])
            mixed = sum(gate * heads[head] for head, gate in choose(normed[row], token, real).items())
            hidden = linear(mixed, expander["expander_in_weight"], expander["expander_in_bias"])
            hidden = hidden * 0.5 * (1 + ERF(hidden / math.sqrt(2)))  # gelu
            expanded = linear(hidden, expander["expander_out_weight"], expander["expander_out_bias"])
            result[row, token] = x[row, token] + expanded
    return norm(result, layer.output.LayerNorm) if is_bert else result


def top(scores: np.ndarray, count: int) -> dict[int, float]:
    return {int(head): scores[head] for head in np.argsort(-scores)[:count]}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def attention_name(model: nn.Module, layer: int) -> str:
    return next(site.name for site in patchattn.find_sites(model) if site.layer_index == layer)
