"""Forwards that are compared: what goes in, what comes out, and how far apart two outputs are."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..core.selection import base_model, input_device

# Largest relative error of a real token, by dtype; an error that the unpatched model has as well is not the patch's.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def first_output(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The first floating tensor of a forward: logits, the last hidden state or what comes first."""
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad():
        result = model(**inputs)
    values = list(result.values()) if isinstance(result, Mapping) else list(result)
    named = [result[name] for name in ("logits", "last_hidden_state") if isinstance(result, Mapping) and name in result]
    return next(v for v in [*named, *values] if isinstance(v, torch.Tensor) and v.is_floating_point())


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference, relative to the largest value; NaN counts as infinite unless both have it."""
    both = left.isnan() & right.isnan()
    gap = (left.double() - right.double()).abs().masked_fill(both, 0.0).nan_to_num(nan=float("inf"))
    scale = right.double().abs().nan_to_num(nan=0.0).max()
    return float(gap.max() / scale.clamp(min=1e-12))


def inputs_for(model: nn.Module, inputs: Mapping[str, Any] | torch.Tensor | None) -> dict[str, Any]:
    """Keyword arguments of a forward, where the model takes its inputs; random tokens or pixels if none are given."""
    if isinstance(inputs, torch.Tensor):
        inputs = {"input_ids": inputs}
    if inputs is not None and not isinstance(inputs, Mapping):
        raise TypeError(
            f"inputs must be a dictionary of a forward's arguments or input ids, got {type(inputs).__name__}."
        )
    if not inputs:
        inputs = random_inputs(base_model(model))
    device = input_device(model)
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def random_inputs(model: nn.Module) -> dict[str, Any]:
    """Random tokens or pixels; ValueError if the model takes something else."""
    config: Any = model.config
    name, generator = getattr(model, "main_input_name", "input_ids"), torch.Generator().manual_seed(0)
    if name == "input_ids":
        tokens = torch.randint(3, config.get_text_config().vocab_size, (2, 16), generator=generator)
        return {"input_ids": tokens, **({"decoder_input_ids": tokens[:, :8]} if config.is_encoder_decoder else {})}
    if name == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        shape = (2, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(shape, generator=generator).to(next(model.parameters()).dtype)}
    raise ValueError(f"{type(model).__name__} takes {name}: give inputs=... to check it.")
