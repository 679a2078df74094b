"""Continuous batching of a patched model: what may be on it, refused where it is asked for, and in a call.

A variant that needs the call alone is right there: the mask says which keys a token's own text has. What is remembered
with the kv cache of `generate`, or goes by which tokens a call brings, is not.
"""

import copy
import inspect
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import ContinuousBatchingConfig, ContinuousMixin

from ...core.probe import chain_on
from .bases import original_config
from .masks import is_flash
from .paged import refuse_chain

_BEGIN, _GENERATE = "init_continuous_batching", "generate_batch"  # what everything begins with, and a loop over it


class _Entry:
    """A method of one model, without a cycle that would keep it in memory; copied and pickled together with it."""

    def __init__(self, method: Callable[..., Any], model: Any) -> None:
        self._method, self._model = method, weakref.ref(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._method(self._of(), *args, **kwargs)

    def __reduce__(self) -> Any:
        return type(self), (self._method, self._of())

    def _of(self) -> Any:
        model = self._model()
        if model is None:
            raise RuntimeError(
                "This is a shallow copy of a patched model that is gone: use copy.deepcopy, or patch the copy anew."
            )
        return model


def watch_batching(model: nn.Module) -> None:
    """Have continuous batching of a patched model begin with `refuse_batching`, and with no keys from before the patch
    in a cache that was kept."""
    if isinstance(model, ContinuousMixin):
        model.destroy_cached_continuous_batching_manager()
        vars(model)[_BEGIN], vars(model)[_GENERATE] = _Entry(_begin, model), _Entry(_generate, model)


def forget_batching(module: nn.Module) -> None:
    """The inverse of `watch_batching`."""
    if vars(module).pop(_BEGIN, None) is not None and isinstance(module, ContinuousMixin):
        module.destroy_cached_continuous_batching_manager()
    vars(module).pop(_GENERATE, None)


def refuse_batching(model: nn.Module) -> None:
    """NotImplementedError if what is on a model, or what computes its attention, cannot be batched continuously."""
    config: Any = model.config
    text = config.get_text_config()
    kv_heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None)
    for module in model.modules():
        chain: Any = chain_on(module)
        if chain is None:
            continue
        refuse_chain(chain)
        if original_config(module) is text and chain.site.kv_heads not in (None, kv_heads):
            raise NotImplementedError(
                f"{chain.site.name} has {chain.site.kv_heads} kv heads, and the configuration, by which the paged "
                f"cache is laid out, says {kv_heads}: such a model cannot be batched continuously. Use generate."
            )
        if is_flash(chain.base):
            raise NotImplementedError(
                f"A patched model is batched continuously under sdpa and eager attention, and {chain.site.name} has "
                f"{chain.base!r}: load the model with attn_implementation='sdpa'."
            )


def _begin(model: Any, *args: Any, **kwargs: Any) -> Any:
    """As the model's own method, but that a patched model stays with its attention implementation."""
    refuse_batching(model)
    method = type(model).init_continuous_batching
    given = inspect.signature(method).bind(model, *args, **kwargs).arguments
    config = copy.copy(given.get("continuous_batching_config")) or ContinuousBatchingConfig()
    config.auto_switch_to_flash = False
    return method(**{**given, "continuous_batching_config": config})


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """As the model's own method, but that requests which failed are no answers.

    Raises:
        RuntimeError: some did, as where a call was refused.
    """
    refuse_batching(model)  # whatever it is called with
    found = type(model).generate_batch(model, *args, **kwargs)
    if faults := {result.error for result in found.values() if result.error}:
        raise RuntimeError(f"Continuous batching of a patched model failed: {'; '.join(sorted(faults))}")
    return found
