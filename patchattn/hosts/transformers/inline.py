"""Attention that a module computes in its own code: variants are called there in place of weights times values.

A tape follows the module's forward, between its hooks; see `tape.py`. Masks reach variants as numbers that are added to
the scores, together with whatever else is.
"""

from typing import Any

import torch
from torch import nn

from patchattn_kernels.rows import seen_by

from ...core.context import close_context, current_context
from ...core.module_call import ModuleCall
from ...core.probe import chain_on, probes_on
from ...core.run import RUN
from ...core.surroundings import LayerContext
from ...core.variant import AttentionOutput
from .context import open_context
from .pattern import ExplicitCall, Pattern
from .tape import Tape

_HANDED_ON = (RUN, "position_ids", "output_attentions")


def open_inline(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pre-hook of a patched module: as `open_context`, and begin to follow what it computes."""
    chain: Any = chain_on(module)
    given = open_context(module, args, kwargs)
    context = current_context(module)
    if context.cache is not None and chain.storing:
        raise NotImplementedError(
            f"{chain.site.module_class} ({chain.site.name}) computes attention itself, and "
            f"{', '.join(map(repr, chain.storing))} would change what its kv cache stores, of which nothing is known "
            "there. Call the model with use_cache=False, or choose settings that leave keys and values as they are."
        )
    # What the module was given as a mask may be one of another meaning: of the scores alone it is known.
    context.attention_mask = None
    if chain.active or probes_on(module):
        owner = f"{chain.site.module_class} ({chain.site.name})"
        context.tape = Tape(owner, lambda found: _attend(module, context, found))
        context.tape.__enter__()
    return given


def close_inline(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Post-hook of the same module, called also where it failed: its output, with the weights of variants."""
    tape = current_context(module).tape
    if tape is not None:
        tape.__exit__(None, None, None)
    close_context(module, args, output)
    return None if tape is None or output is None else tape.finished(output)


def _attend(module: nn.Module, context: LayerContext, found: Pattern | ExplicitCall) -> AttentionOutput:
    chain: Any = chain_on(module)
    context.attention_mask, context.leads_by_sequence = found.mask, found.leads_by_sequence
    kwargs = {name: context.arguments[name] for name in _HANDED_ON if name in context.arguments}
    kwargs |= {"scaling": found.scaling, "dropout": found.dropout, "is_causal": _is_causal(chain, context, found)}
    if found.position_bias is not None:
        kwargs["position_bias"] = found.position_bias

    def base(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        return found.base(query, key, value, mask, kwargs.get("position_bias"), kwargs["scaling"])

    given = ModuleCall(module, found.query, found.key, found.value, found.mask, kwargs)
    return chain(given, base)


def _is_causal(chain: Any, context: LayerContext, found: Pattern | ExplicitCall) -> bool:
    """Whether later keys are hidden: as the call says, or what it hides, seen in a first call, or else that it has a
    cache; which encoders may have too (XLM).

    Raises:
        NotImplementedError: nothing tells, and the first call is compiled.
    """
    if isinstance(found, ExplicitCall) and found.is_causal:
        return True
    if found.mask is None or chain.site.is_cross:
        return False
    rows, keys = found.mask.shape[2:]
    if rows < found.query.shape[2]:  # it says the same of all queries
        return False
    if chain.hides_later is None and rows == keys > 1:
        if torch.compiler.is_compiling():
            raise NotImplementedError(
                f"{chain.site.module_class} ({chain.site.name}) does not say whether it is causal: call the model once "
                "before it is compiled."
            )
        chain.hides_later = _hides_later(found.mask)
    return context.cache is not None if chain.hides_later is None else bool(chain.hides_later)


def _hides_later(mask: torch.Tensor) -> bool | None:
    """Whether of two tokens that see themselves none sees the later one; `None` where there are no two."""
    seen = seen_by(mask)
    itself = seen.diagonal(dim1=-2, dim2=-1)
    pairs = (itself[..., :, None] & itself[..., None, :]).triu(1)
    if not bool(pairs.any()):
        return None
    return not bool((pairs & seen).any())
