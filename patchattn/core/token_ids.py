"""Which ids the tokens of a call have: hooks on the text model hand them down to its attention."""

import inspect
from typing import Any

import torch
from torch import nn

from .call import AttentionCall
from .hooks import Hook, called_with, note_token_ids, unknown_ids
from .run import RUN, current_run, end_run, run_of
from .selection import base_model
from .variant import Variant

_IDS = "token_ids"  # a fact of a run: `(B, T)` int


class TokenIdVariant(Variant):
    """A variant that asks for `token_ids(call)`, by hooks on the text model that its attention module is in.

    Attributes:
        name: of the variant, for messages.
    """

    name: str

    def hooks(self, model: nn.Module) -> list[Hook]:
        base: Any = base_model(model)
        text = text_model(base, self.site.name)
        return [
            *super().hooks(model),
            Hook(base, "before", self.before_model),
            Hook(text.get_input_embeddings(), "before", self.before_embedding),  # type: ignore[operator]
            Hook(text, "before", self.before_text_model),
            Hook(text, "finally", self.after_text_model),
            Hook(base, "finally", self.after_model),
        ]

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current_run().token_ids = None  # of what was embedded outside of a forward

    def before_embedding(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note_token_ids(args, kwargs)

    def before_text_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand `token_ids` down; NotImplementedError if nobody knows the ids of its input (`hooks.unknown_ids`)."""
        given, run = called_with(module, args, kwargs), run_of(kwargs)
        ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
        ids = run.facts.get(_IDS, run.token_ids) if ids is None else ids
        if ids is None or (embeddings is not None and ids.shape[1] != embeddings.shape[1]):
            embedding = module.get_input_embeddings()  # type: ignore[operator]
            raise unknown_ids(self.name, embedding, self.before_embedding)
        return args, {**kwargs, RUN: run.handed_down({_IDS: ids})}

    def after_text_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        current_run().token_ids = None

    def after_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        end_run()


def token_ids(call: AttentionCall) -> torch.Tensor:
    """`(B, Tq)` ids of the tokens of a call.

    Raises:
        NotImplementedError: its text model has no hook that says them (`TokenIdVariant`), or they did not arrive.
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
