"""Continuous batching, whose paged kv cache no variant sees right: refused where it is asked for, and in a call."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import ContinuousMixin
from transformers.generation.continuous_batching import PagedAttentionCache

REFUSAL = "Continuous batching is not supported on a patched model"
# Whatever begins it; what ends it is left.
_ENTRIES = [name for name in vars(ContinuousMixin) if "batch" in name and not name.startswith(("_", "destroy"))]


def forbid_batching(model: nn.Module) -> None:
    """Refuse it where it is asked for: its own loop turns an error into requests that end without an answer."""
    for name in _ENTRIES if isinstance(model, ContinuousMixin) else ():
        vars(model)[name] = _refuse


def allow_batching(module: nn.Module) -> None:
    """The inverse of `forbid_batching`."""
    for name in _ENTRIES:
        vars(module).pop(name, None)


def refuse_paged(arguments: Mapping[str, Any]) -> None:
    """NotImplementedError if a module or its attention function is called with continuous batching's kv cache."""
    for value in arguments.values():
        if isinstance(value, PagedAttentionCache):
            raise NotImplementedError(f"{REFUSAL} (a paged kv cache).")


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError(f"{REFUSAL}. Use generate, or patchattn.unpatch_model(model) first.")
