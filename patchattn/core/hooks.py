"""Hooks of variants, and what they tell attention that its call does not, such as the residual stream.

It travels in a keyword argument (`run.RUN`), which layers hand on to their attention function.
"""

import inspect
import re
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .run import RESIDUAL, RUN, current_run, run_of

_REGISTER = nn.Module.register_forward_pre_hook.__name__


class HookOrder:
    """In place of `register_forward_pre_hook` of one module: whatever is registered later runs before our hooks, which
    must see what the module is really called with.

    Knows its module weakly: a cycle would keep a model that nobody needs any more until the next garbage collection.
    """

    def __init__(self, module: nn.Module, ours: Iterable[int] = ()) -> None:
        self.module = weakref.ref(module)
        self.ours = list(ours)

    def __call__(self, hook: Callable[..., Any], **options: Any) -> RemovableHandle:
        module = cast(nn.Module, self.module())
        handle = type(module).register_forward_pre_hook(module, hook, **options)
        self.restore(module)
        return handle

    def restore(self, module: nn.Module) -> None:
        """Put our hooks behind all others."""
        hooks = module._forward_pre_hooks
        for hook_id in self.ours:
            if hook_id in hooks:
                hooks[hook_id] = hooks.pop(hook_id)

    def __deepcopy__(self, memo: dict[int, Any]) -> "HookOrder":
        module = cast(nn.Module, self.module())
        return HookOrder(memo.get(id(module), module), self.ours)

    def __reduce__(self) -> Any:
        return HookOrder, (self.module(), self.ours)


def register_last(module: nn.Module, hook: Callable[..., Any], *, with_kwargs: bool = True) -> None:
    """Place a hook before a module's forward, behind the hooks that are there and those that come later."""
    order = vars(module).get(_REGISTER)
    if order is None:
        order = vars(module)[_REGISTER] = HookOrder(module)
    order.ours.append(order(hook, with_kwargs=with_kwargs).id)


def refuse_later_hooks(module: nn.Module) -> None:
    """RuntimeError if a hook was placed behind the one of ours that reads what the module is called with.

    Only a registration that went around the module's own method can do that.
    """
    order = vars(module).get(_REGISTER)
    if order is not None and next(reversed(module._forward_pre_hooks)) not in order.ours:
        order.restore(module)
        raise RuntimeError(
            f"A forward pre-hook was placed on a patched {type(module).__name__} by other means than its own "
            "register_forward_pre_hook, so that this call's input was read before that hook changed it. The order is "
            "restored: call the model again."
        )


def remove_hooks(module: nn.Module, is_ours: Callable[[Any], bool]) -> None:
    """Take the hooks of patches off a module."""
    places = (module._forward_pre_hooks, module._forward_hooks)
    keyed = (
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
    )
    for place in places:
        for key in [key for key, hook in place.items() if is_ours(hook)]:
            for hooks in (place, *keyed):
                hooks.pop(key, None)
    order = vars(module).get(_REGISTER)
    if order is not None and not any(key in module._forward_pre_hooks for key in order.ours):
        del vars(module)[_REGISTER]


@dataclass(frozen=True)
class Hook:
    """A method of a variant to be called before or after a module, with its keyword arguments.

    `finally` is after it too, but also where it failed: its output is then `None`.
    """

    module: nn.Module
    when: Literal["before", "after", "finally"]
    method: Callable[..., Any]

    def install(self) -> None:
        """Place it; once, if one variant asks for it from several attention modules."""
        place = self.module._forward_pre_hooks if self.when == "before" else self.module._forward_hooks
        if any(_method(hook) == _method(self.method) for hook in place.values()):
            return
        if self.when == "before":
            register_last(self.module, self.method)
        else:
            self.module.register_forward_hook(self.method, with_kwargs=True, always_call=self.when == "finally")


def install_hooks(model: nn.Module, variants: nn.Module) -> None:
    """Place the hooks of an attention module's variants."""
    for variant in variants.children():
        if not variant.is_identity:
            for hook in variant.hooks(model):  # type: ignore[operator]
                hook.install()


def _function(hook: Callable[..., Any]) -> Any:
    return getattr(hook, "__func__", hook)


def _method(hook: Callable[..., Any]) -> tuple[Any, type]:
    """Its function, and the class that it is called for: variants share functions by inheritance."""
    return _function(hook), type(getattr(hook, "__self__", None))


def enclosing_layer(site_name: str) -> str:
    """Name of the numbered layer that an attention module is in; NotImplementedError without one."""
    found = re.match(r"(?:.*\.)?\d+(?=\.)", site_name)
    if found is None:
        raise NotImplementedError(f"{site_name} is in no numbered layer, whose input a variant reads.")
    return found[0]


def called_with(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """By name, what a module is called with: some models hand tokens and masks on by place."""
    return {**inspect.signature(module.forward).bind_partial(*args).arguments, **kwargs}


def with_residual(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a layer is called with, and `Surroundings.residual` for its attention: its input, without its gradient."""
    hidden = args[0] if args else kwargs["hidden_states"]
    return args, {**kwargs, RUN: run_of(kwargs).handed_down({RESIDUAL: hidden.detach()})}


def note_token_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Keep the ids that the input embedding is called with, until the language model runs."""
    ids = args[0] if args else kwargs.get("input")
    if isinstance(ids, torch.Tensor) and ids.dim() == 2:
        current_run().token_ids = ids


def unknown_ids(owner: str, embedding: nn.Module, hook: Callable[..., Any]) -> NotImplementedError:
    """The refusal where nobody knows the ids of what the language model is called with.

    Args:
        owner: variant, for the message.
        embedding: what the model now embeds ids with.
        hook: the variant's, on the module that did so when the model was patched.
    """
    reason = (
        "got inputs_embeds alone. (So does a language model that reentrant activation checkpointing runs again as a "
        "whole: checkpoint its layers, or with use_reentrant=False.)"
    )
    if not any(_function(each) is _function(hook) for each in embedding._forward_pre_hooks.values()):
        reason = (
            f"it saw none. {type(embedding).__name__} has taken the place of the input embedding since the model was "
            "patched, as trainable_token_indices of an adapter do it: call patchattn.unpatch_model(model), then patch "
            "it again. (inputs_embeds alone would not do either.)"
        )
    return NotImplementedError(f"{owner} needs input_ids to know what its tokens are; {reason}")
