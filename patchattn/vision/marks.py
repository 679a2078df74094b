"""Image tokens as attention sees them: a hook on the language model hands down which of its tokens they are."""

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..core.call import AttentionCall
from ..core.hooks import unknown_ids
from ..core.run import RUN, run_of
from .images import is_replaced

IMAGE_TOKENS = "image_tokens"  # a fact of a run: `(B, T)` bool
_marked = WeakTensorKeyDictionary()  # embeddings that backward may need again: their version, and their marks


def image_tokens(call: AttentionCall) -> torch.Tensor:
    """`(B, Tq)` bool: which tokens of a call are image tokens.

    Raises:
        NotImplementedError: its language model has no hook that says so (`with_image_tokens`), or it did not arrive.
    """
    return call.context.handed_down(IMAGE_TOKENS, "which of its tokens are image tokens")


def with_image_tokens(
    unknown: Callable[[], Exception], placeholders: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a language model is called with, and `image_tokens` for its attention.

    Args:
        unknown: makes what is raised where nobody knows the ids of its input.
        placeholders: ids that image tokens take the place of.
        args: what the language model is called with by position.
        kwargs: what it is called with by name.

    Raises:
        NotImplementedError: nobody knows the ids of its input (`core.hooks.unknown_ids`).
    """
    run = run_of(kwargs)
    marks = run.facts.get(IMAGE_TOKENS)
    embeddings = kwargs.get("inputs_embeds")
    if marks is None:
        ids = args[0] if args else kwargs.get("input_ids")
        ids = run.token_ids if ids is None else ids
        if ids is None or (embeddings is not None and _misfit(ids, embeddings)):
            return args, {**kwargs, RUN: run.handed_down({IMAGE_TOKENS: _marks_before(embeddings, unknown)})}
        marks = torch.zeros_like(ids, dtype=torch.bool)
        for placeholder in placeholders:
            marks = marks | (ids == placeholder)
    if embeddings is not None:  # which are repeated for beams where ids are not
        marks = marks.repeat_interleave(len(embeddings) // max(len(marks), 1), dim=0).to(embeddings.device)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not embeddings.is_inference():
            _marked[embeddings] = (embeddings._version, marks)
    return args, {**kwargs, RUN: run.handed_down({IMAGE_TOKENS: marks})}


def with_true_image_tokens(
    owner: str,
    placeholders: tuple[int, ...],
    module: nn.Module,
    before_embedding: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`with_image_tokens`, without placeholders that the model wrote itself, which are text.

    Args:
        owner: variant, for messages.
        placeholders: ids that image tokens take the place of.
        module: the language model.
        before_embedding: the variant's hook on what embeds ids, which notes them.
        args: what the language model is called with by position.
        kwargs: what it is called with by name.

    Raises:
        NotImplementedError: as `with_image_tokens`.
    """
    embedding = module.get_input_embeddings()  # type: ignore[operator]
    unknown = functools.partial(unknown_ids, owner, embedding, before_embedding)
    args, kwargs = with_image_tokens(unknown, placeholders, args, kwargs)
    embeddings, run = kwargs.get("inputs_embeds"), kwargs[RUN]
    if embeddings is None:
        return args, kwargs
    marks = run.facts[IMAGE_TOKENS]
    for placeholder in placeholders:
        marks = marks & is_replaced(embeddings, placeholder, embedding)
    return args, {**kwargs, RUN: run.handed_down({IMAGE_TOKENS: marks})}


def _marks_before(embeddings: torch.Tensor | None, unknown: Callable[[], Exception]) -> torch.Tensor:
    """The marks of the very embeddings that a language model was called with before: `backward` runs it again where it
    is checkpointed as a whole."""
    version, marks = _marked.get(embeddings, (None, None)) if embeddings is not None else (None, None)
    if marks is None or embeddings is None or version != embeddings._version:
        raise unknown()
    return cast(torch.Tensor, marks)


def _misfit(ids: torch.Tensor, embeddings: torch.Tensor) -> bool:
    return ids.shape[1] != embeddings.shape[1] or len(embeddings) % max(len(ids), 1) != 0
