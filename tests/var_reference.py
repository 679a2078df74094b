"""VAR written out over whole attention matrices, in float64: what its tests compare with."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from . import vlms

DIMS = [3, 17]
# Random weights have no massive activations: a threshold at which some tokens are sinks and some are not.
LOW = {
    "sink_dims": DIMS,
    "sink_threshold": 1.0,
    "max_sink_share": 0.8,
    "min_image_share": 0.1,
    "first_layer": 0,
    "except_last": False,
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"move_fraction": 1.0, "max_sink_share": 0.9, "min_image_share": 0.05},
    {"move_fraction": 0.25, "max_sink_share": 1.0, "min_image_share": 0.0, "first_layer": 1},
    {"except_last": True, "sink_threshold": 1.4, "max_sink_share": 0.5, "min_image_share": 0.2},
]
FAMILIES = ["llava", "llava_next", "qwen2_5_vl"]
DEFAULTS = {"move_fraction": 0.4, "max_sink_share": 0.5, "min_image_share": 0.2}


def redistribute(weights: np.ndarray, sink: np.ndarray, image: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """The equations on one head's matrix `(N, N)`, zero where not visible; sinks and image tokens `(N,)`."""
    s, out = {**DEFAULTS, **settings}, weights.copy()
    for i, row in enumerate(weights):
        seen = [t for t in range(len(row)) if row[t] > 0]
        of_image = sum(row[t] for t in seen if image[t])
        of_visual_sinks = sum(row[t] for t in seen if image[t] and sink[t])
        of_others = sum(row[t] for t in seen if image[t] and not sink[t])
        if image[i] or of_visual_sinks == 0 or of_others == 0:
            continue
        if of_image < s["min_image_share"] or of_visual_sinks / of_image > s["max_sink_share"]:
            continue
        budget = 0.0
        for t in seen:
            if sink[t]:
                budget += s["move_fraction"] * row[t]
                out[i, t] = (1 - s["move_fraction"]) * row[t]
        for t in seen:
            if image[t] and not sink[t]:
                out[i, t] = row[t] + budget * row[t] / of_others
    return out


def are_sinks(hidden: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """`(..., T)` of hidden states `(..., T, E)`."""
    size = np.sqrt((hidden**2).mean(-1))
    return np.abs(hidden[..., settings["sink_dims"]]).max(-1) > settings["sink_threshold"] * size


@contextmanager
def brute_force(model: nn.Module, image: torch.Tensor, settings: dict[str, Any]) -> Iterator[nn.Module]:
    """The unpatched model, whose language model computes N x N matrices and redistributes them.

    Args:
        model: unpatched.
        image: `(B, N)` bool.
        settings: as VAR's.
    """
    hidden: dict[Any, np.ndarray] = {}
    changes = [0]

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, Any]:
        mask = attention_mask
        batch, heads, rows, dim = query.shape
        repeat = heads // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        visible = torch.ones(1, 1, rows, rows, dtype=torch.bool) if mask is None else mask > -1e30
        visible = visible.expand(batch, heads, -1, -1)
        logits = (query @ key.mT * (kwargs.get("scaling") or dim**-0.5)).double().masked_fill(~visible, -1e300)
        weights = (logits.softmax(-1) * visible).detach().numpy().copy()
        if module in hidden:
            sinks = are_sinks(hidden[module], settings)
            for b in range(batch):
                for h in range(heads):
                    changed = redistribute(weights[b, h], sinks[b], image[b].numpy(), settings)
                    changes[0] += int((changed != weights[b, h]).any())
                    weights[b, h] = changed
        weights = torch.from_numpy(weights)
        return (weights.to(value) @ value).transpose(1, 2), weights

    AttentionInterface.register("brute_force", attend)
    AttentionMaskInterface.register("brute_force", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    twin: Any = copy.deepcopy(model)
    twin.set_attn_implementation("brute_force")
    layers = twin.get_decoder().layers
    first, last = settings["first_layer"], len(layers) - settings["except_last"]
    for layer in layers[first:last]:
        layer.register_forward_pre_hook(
            lambda layer, args: hidden.update({layer.self_attn: args[0].detach().double().numpy()})
        )
    try:
        yield twin
        assert changes[0], "nothing was redistributed: the test shows nothing"
    finally:
        AttentionInterface._global_mapping.pop("brute_force")
        AttentionMaskInterface._global_mapping.pop("brute_force")


def logits_of(model: nn.Module, given: dict[str, Any], **extra: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**given, **extra).logits


def expected(model: nn.Module, given: dict[str, Any], settings: dict[str, Any]) -> torch.Tensor:
    with brute_force(model, given["input_ids"] == vlms.IMAGE, settings) as twin:
        return logits_of(twin, given, use_cache=False)


def close(left: torch.Tensor, right: torch.Tensor) -> None:
    """Rotary angles of Qwen2.5-VL are of float32 positions, which padding shifts; `generate` adds in float32."""
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def exact(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return vlms.make(name, dtype=torch.float64), vlms.inputs(name, dtype=torch.float64)


def extended(given: dict[str, torch.Tensor], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs with `(B, n)` more tokens of text."""
    longer = {**given, "input_ids": torch.cat([given["input_ids"], tokens], dim=1)}
    longer["attention_mask"] = torch.cat([given["attention_mask"], torch.ones_like(tokens)], dim=1)
    if "mm_token_type_ids" in given:
        longer["mm_token_type_ids"] = torch.cat(
            [given["mm_token_type_ids"], torch.zeros_like(tokens, dtype=torch.int)], dim=1
        )
    return longer
