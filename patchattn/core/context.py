"""What an attention module is called with, kept from the start of the call to its end."""

import sys
import threading
from typing import Any

from torch import nn

from .surroundings import LayerContext

_local = threading.local()  # .context: the attention module now running in this thread


def current_context(module: nn.Module) -> LayerContext:
    """What the attention module that now runs in this thread was called with.

    Raises:
        RuntimeError: it was not called as a module, or before its hooks were there.
    """
    context = getattr(_local, "context", None)
    if context is None or context.module is not module:
        if _is_called(module):
            raise RuntimeError(
                f"The model was patched, in another thread, while this one ran it: {type(module).__name__} was called "
                "before its hooks were there. Patch and unpatch when no forward runs, and start that one anew."
            )
        raise RuntimeError(
            f"{type(module).__name__} was not called as a module, so that its hooks did not run; a patched attention "
            "module must be called, not its forward method."
        )
    return context


def running_module() -> nn.Module:
    """The patched attention module that now runs in this thread, for hooks on what is inside of it.

    Raises:
        RuntimeError: none does: what is inside was called by itself.
    """
    context: LayerContext | None = getattr(_local, "context", None)
    if context is None:
        raise RuntimeError("A projection of a patched attention module was called by itself: call the whole module.")
    return context.module


def _is_called(module: nn.Module) -> bool:
    """Whether the module, and not just its forward method, is being called in this thread."""
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        frame = caller
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals["self"] is module:
            return True
    return False


def begin_context(context: LayerContext) -> None:
    """The module's call begins."""
    _local.context = context


def note_attention(module: nn.Module) -> None:
    """The module's call has come to its attention function."""
    context = getattr(_local, "context", None)
    if context is not None and context.module is module:
        context.attended = True


def close_context(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Post-hook of a patched module, called also where it failed: let go of the tensors."""
    context: LayerContext | None = getattr(_local, "context", None)
    _local.context = None
    if context is not None and context.tap is not None:
        context.tap.close()


def leave(module: nn.Module) -> None:
    """The hooks of a module are taken off; if it runs now, none of them ends its call."""
    context: LayerContext | None = getattr(_local, "context", None)
    if context is not None and context.module is module:
        _local.context = None


def note_raw_query(norm: nn.Module, args: tuple[Any, ...]) -> None:
    """Pre-hook of a query norm: keep what it is about to normalise."""
    context = getattr(_local, "context", None)
    if context is not None:
        context.raw_query = args[0]
