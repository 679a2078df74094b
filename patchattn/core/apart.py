"""Calls of an attention module some of whose kv heads keep their keys apart: two calls of other lengths, one output.

A rectangle of keys with empty slots would save nothing where half of the heads forget and the others do not.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ..cache.numbers import indices
from ..cache.tracked import TrackedLayer
from .module_call import ModuleCall
from .sites import AttentionSite
from .variant import AttentionOutput


def attend_apart(
    given: ModuleCall,
    keys: torch.Tensor,
    apart: tuple[Sequence[int], TrackedLayer],
    site: AttentionSite,
    names: Sequence[str],
    attend: Callable[[ModuleCall, bool], AttentionOutput],
) -> AttentionOutput:
    """Attention of the heads that are apart and of the others, put together.

    Args:
        given: the call, with the keys and values of the others.
        keys: those of the others, as their layer of the kv cache holds them.
        apart: numbers of the kv heads that are apart, and the layer that holds their keys.
        site: the attention module.
        names: the variants that act on it.
        attend: one of the two calls, and whether it is that of the heads apart.

    Raises:
        NotImplementedError: another variant is there, or the call has, or asks for, something by head.
    """
    kv_heads, other = apart
    held = given.key.shape[1]
    fault = None
    if len(names) > 1:
        fault = (
            f"the variants {', '.join(map(repr, names))} would have to act on heads with other keys: patch one alone"
        )
    elif held != keys.shape[1] or given.query.shape[1] % (held + len(kv_heads)):
        fault = "its keys are not those that its cache gives"
    elif given.kwargs.get("output_attentions"):
        fault = "attention weights over other keys in some heads do not form one tensor"
    elif given.kwargs.get("s_aux") is not None or given.kwargs.get("position_bias") is not None:
        fault = "it has sinks, or a position bias, by head"
    if fault is not None:
        raise NotImplementedError(f"{site.module_class} ({site.name}) keeps keys of some heads apart, and {fault}.")
    group = given.query.shape[1] // (held + len(kv_heads))
    is_apart = [head // group in kv_heads for head in range(given.query.shape[1])]
    chosen = [tuple(head for head, each in enumerate(is_apart) if each is part) for part in (False, True)]
    device = given.query.device
    states = ((given.key, given.value), (other.keys, other.values))
    outputs = []
    for part, some, (key, value) in zip((False, True), chosen, states, strict=True):
        heads, mask = indices(some, device), given.mask
        if isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.shape[1] > 1:
            mask = mask[:, heads]
        query, key, value = given.query.index_select(1, heads), key.to(device), value.to(device)
        outputs.append(attend(replace(given, query=query, key=key, value=value, mask=mask), part)[0])
    joined = chosen[0] + chosen[1]
    order = indices(tuple(sorted(range(len(joined)), key=joined.__getitem__)), device)
    return torch.cat(outputs, dim=2).index_select(2, order), None
