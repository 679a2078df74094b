"""transformers as a host: what the core asks of one, see `core/host.py`.

A patched attention module gets a copy of its configuration that names `patchattn_<base>` as the attention
implementation, where `<base>` is what the model's own configuration names. transformers then calls our function, which
runs the variants attached to the calling module, outermost first, and last the base implementation itself. A module
with nothing attached goes straight to the base.

One whose own code computes attention, in a tower where no module asks for a function by name, is followed instead while
it runs (`inline.py`): its configuration stays as it is.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...core.context import close_context, note_raw_query
from ...core.hooks import register_last
from ...core.probe import chain_on, probes_on
from .bases import base_function, keep, let_go, original_config, release, seam_config
from .batching import forget_batching as forget
from .batching import watch_batching
from .compatibility import asks_for_name, seam_name
from .context import close_proving, open_context
from .inline import close_inline, open_inline
from .masks import is_flash, mask_of_call
from .sites import INLINE, dispatches, find_sites, find_undispatched
from .told import forget_told, note_told, watch_masks

__all__ = [
    "base_of",
    "computes_softmax",
    "connect",
    "disconnect",
    "find_sites",
    "find_undispatched",
    "forget",
    "keep",
    "let_go",
    "mask_of_call",
    "owns",
    "refuse_bases",
    "release",
]
_HOOKS = (open_context, close_context, close_proving, open_inline, close_inline, note_raw_query, note_told, forget_told)


def base_of(module: nn.Module) -> str:
    """Name of the base implementation of an attention module, patched or not."""
    return INLINE if not dispatches(module) else original_config(module)._attn_implementation or "eager"


def refuse_bases(model: nn.Module, sites: Sequence[str]) -> None:
    """NotImplementedError if some attention modules, by name, have no attention function that could be called."""
    for name in sites:
        if dispatches(module := model.get_submodule(name)):
            base_function(type(module), base_of(module))


def connect(model: nn.Module, module: nn.Module) -> None:
    """Point a module's configuration at the seam, and place the hooks that its variants need."""
    watch_batching(model)
    chain: Any = chain_on(module)  # or PEFT's wrapper around one, which passes attributes on
    asks = False
    if chain.base == INLINE:
        begin, end = open_inline, close_inline
    else:
        asks = asks_for_name(module, chain.base)
        begin, end = open_context, close_proving if asks else close_context
        config: Any = module.config
        if config._attn_implementation != seam_name(chain.base):
            vars(module)["config"] = seam_config(module, chain.base)
    if (asks or chain.needs_context or probes_on(module)) and begin not in module._forward_pre_hooks.values():
        register_last(module, begin)
        module.register_forward_hook(end, always_call=True, prepend=chain.base == INLINE)
        if chain.site.query_norm is not None:
            register_last(module.get_submodule(chain.site.query_norm), note_raw_query, with_kwargs=False)
    if chain.active:
        watch_masks(model, chain.site.name)


def disconnect(module: nn.Module) -> None:
    """Give a module the configuration that it had."""
    if dispatches(module):
        vars(module)["config"] = original_config(module)


def owns(hook: Any) -> bool:
    """Whether a hook on a module was placed by `connect`."""
    return hook in _HOOKS


def computes_softmax(base: str) -> bool:
    """Whether a base implementation is sdpa or flash attention as transformers has them, or a Hub kernel."""
    function = ALL_ATTENTION_FUNCTIONS.get(base)  # one of the user's own may compute something else
    return function in (sdpa_attention_forward, flash_attention_forward) or (function is None and is_flash(base))
