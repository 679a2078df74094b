"""Watching a patched model at work: gates, temperatures and whatever else a variant reports."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from .report import Observation
from .unfitting import refuse_parts
from .variant import Observer, Variant


@contextmanager
def observe(model: nn.Module, observer: Callable[[Observation], None]) -> Iterator[None]:
    """Call `observer(observation)` whenever a variant of the model reports intermediate values.

    Args:
        model: a patched model, in whatever wrapper.
        observer: gets an `Observation`: the layer, and detached tensors by name, such as `gate` `(B, Tq, H)` of MoH or
            `query_temperature` `(B or 1, Tq)` of SSA. Padded rows are included; `observation.real_tokens()` tells them.

    Raises:
        ValueError: the model carries no variant.
        NotImplementedError: several processes share its heads.
    """

    def detached(observation: Observation) -> None:
        observer(replace(observation, values={name: v.detach() for name, v in observation.values.items()}))

    variants = [module for module in model.modules() if isinstance(module, Variant)]
    if not variants:
        raise ValueError(f"{type(model).__name__} is not patched; there is nothing to observe.")
    refuse_parts([variant.site for variant in variants], "what variants report")
    with _watched(variants, detached):
        yield


@contextmanager
def observed(model: nn.Module, observer: Observer) -> Iterator[None]:
    """`observe` of what chooses heads per token, for losses: the values keep their gradients."""
    with _watched([module for module in model.modules() if isinstance(module, Variant) and module.routes], observer):
        yield


@contextmanager
def _watched(variants: Sequence[Variant], observer: Observer) -> Iterator[None]:
    for variant in variants:
        variant.observers.append(observer)
    try:
        yield
    finally:
        for variant in variants:
            variant.observers.remove(observer)
