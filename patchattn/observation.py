"""Watching a patched model at work: gates, temperatures and whatever else a variant reports."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .call import AttentionCall
from .selection import base_model
from .variant import Variant


@contextmanager
def observe(model: nn.Module, observer: Callable[[AttentionCall, dict[str, torch.Tensor]], None]) -> Iterator[None]:
    """Call `observer(call, values)` whenever a variant of the model reports intermediate values.

    Args:
        model: a patched model.
        observer: gets the call (its `site` says which layer) and detached tensors by name, such as `gate`
            `(B, Tq, H)` of MoH or `query_temperature` `(B or 1, Tq)` of SSA. Padded rows are included.

    Raises:
        ValueError: the model carries no variant.
    """
    variants = [module for module in base_model(model).modules() if isinstance(module, Variant)]
    if not variants:
        raise ValueError(f"{type(model).__name__} is not patched; there is nothing to observe.")
    for variant in variants:
        variant.observers.append(observer)
    try:
        yield
    finally:
        for variant in variants:
            variant.observers.remove(observer)
