"""Which ids the tokens of a call have: a hook on the text model hands them down to its attention."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .call import AttentionCall
from .hooks import called_with, unknown_ids
from .run import RUN, run_of

_IDS = "token_ids"  # a fact of a run: `(B, T)` int


def token_ids(call: AttentionCall) -> torch.Tensor:
    """`(B, Tq)` ids of the tokens of a call.

    Raises:
        NotImplementedError: its text model has no hook that says them (`with_token_ids`), or they did not arrive.
    """
    return call.context.handed_down(_IDS, "the ids of its tokens")


def text_model(model: nn.Module, site_name: str) -> nn.Module:
    """The module nearest to an attention module that is called with ids: the language model, of several towers its own.

    Raises:
        NotImplementedError: there is none.
    """
    path = site_name.split(".")
    for end in range(len(path) - 1, -1, -1):
        module = model.get_submodule(".".join(path[:end]))
        if "input_ids" in inspect.signature(module.forward).parameters:
            return module
    raise NotImplementedError(f"No module around {site_name} is called with input_ids, by which tokens are told apart.")


def with_token_ids(
    owner: str, module: nn.Module, before_embedding: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a text model is called with, and `token_ids` for its attention.

    Args:
        owner: variant, for messages.
        module: the text model.
        before_embedding: the variant's hook on what embeds ids, which notes them (`hooks.note_token_ids`).
        args: what the text model is called with by position.
        kwargs: what it is called with by name.

    Raises:
        NotImplementedError: nobody knows the ids of its input (`hooks.unknown_ids`).
    """
    given, run = called_with(module, args, kwargs), run_of(kwargs)
    ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
    ids = run.facts.get(_IDS, run.token_ids) if ids is None else ids
    if ids is None or (embeddings is not None and ids.shape[1] != embeddings.shape[1]):
        embedding = module.get_input_embeddings()  # type: ignore[operator]
        raise unknown_ids(owner, embedding, before_embedding)
    return args, {**kwargs, RUN: run.handed_down({_IDS: ids})}
