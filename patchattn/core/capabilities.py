"""What of the optional capabilities of variants a call needs."""

from collections.abc import Collection

import torch

from .call import AttentionCall


def needed_capabilities(call: AttentionCall, asked: Collection[str]) -> set[str]:
    """Which of some of the optional capabilities one call relies on. Only for `padding` and `static_cache` it asks the
    device."""
    return _needed(call, asked) & set(asked)


def _needed(call: AttentionCall, asked: Collection[str]) -> set[str]:
    kwargs, rows, keys = call.kwargs, call.query.shape[2], call.key.shape[2]
    needed = {"cross"} if call.site.is_cross else {"causal" if call.is_causal else "bidirectional"}
    names = {"softcap": "softcap", "s_aux": "sinks", "position_bias": "position_bias"}
    needed |= {capability for name, capability in names.items() if kwargs.get(name) is not None}
    if call.query.shape[1] != call.key.shape[1]:
        needed.add("gqa")
    if kwargs.get("dropout") and call.module.training:
        needed.add("dropout")
    if torch.compiler.is_compiling():
        needed.add("compile")
        return needed  # what follows reads values
    if keys > rows and call.is_causal and not call.site.is_cross:
        needed.add("kv_cache")
    cache = call.context.layer.cache if call.context.layer is not None else None
    unseen = "static_cache" if getattr(cache, "is_compileable", False) else "padding"
    if unseen in asked and call.mask.given is not None and bool((call.mask.counts()[:, -1] < keys).any()):
        needed.add(unseen)
    return needed
