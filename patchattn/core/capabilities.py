"""What of the optional capabilities of variants a call needs."""

from collections.abc import Collection

import torch

from .call import AttentionCall

_ARGUMENTS = (("softcap", "softcap"), ("s_aux", "sinks"), ("position_bias", "position_bias"))  # and what each needs


def needed_capabilities(call: AttentionCall, asked: Collection[str]) -> set[str]:
    """Which of some of the optional capabilities one call relies on. Only for `padding` and `static_cache` it asks the
    device."""
    return _needed(call, asked) & set(asked)


def _needed(call: AttentionCall, asked: Collection[str]) -> set[str]:
    kwargs, rows, keys = call.kwargs, call.query.shape[2], call.key.shape[2]
    kind = "cross" if call.site.is_cross else "causal" if call.is_causal else "bidirectional"
    needed = {kind}
    for name, capability in _ARGUMENTS:
        if kwargs.get(name) is not None:
            needed.add(capability)
    if call.query.shape[1] != call.key.shape[1]:
        needed.add("gqa")
    if kwargs.get("dropout") and call.module.training:
        needed.add("dropout")
    if keys > rows and kind == "causal":
        needed.add("kv_cache")
    if "compile" in asked and torch.compiler.is_compiling():
        needed.add("compile")
    reads = call.mask.given is not None and ("padding" in asked or "static_cache" in asked)  # the device is asked
    if reads and not torch.compiler.is_compiling():
        cache = call.context.layer.cache if call.context.layer is not None else None
        unseen = "static_cache" if getattr(cache, "is_compileable", False) else "padding"
        if unseen in asked and bool((call.mask.counts()[:, -1] < keys).any()):
            needed.add(unseen)
    return needed
