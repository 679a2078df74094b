"""Base implementations: what is registered with transformers for each, and which one computes for a module.

A patched attention module gets a copy of its configuration that names `patchattn_<base>`, where `<base>` is what the
model's own configuration names.
"""

import copy
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ...core.context import note_attention
from ...core.host import PatchedModule
from ...core.module_call import ModuleCall
from ...core.probe import chain_on, probes_on
from ...core.run import ModelRun, run_of
from ...core.variant import AttentionOutput
from .compatibility import AnsweringName, asks_for_name, seam_name
from .masks import is_flash
from .paged import PAGED, as_causal, refuse_chain
from .sites import INLINE, REGISTRY_NAME, attention_forward

_ORIGINAL = "_patchattn_original"  # attribute of a patched module's configuration: the configuration it is a copy of
# A configuration's own way of looking up attributes costs several calls of Python, for every layer and token.
_plainly = object.__getattribute__

_base_names: dict[str, str] = {}  # our name -> the base implementation's
# Where a module class looks functions up, and the name of its own eager one: reading them off its code takes long, and
# cannot be traced. The functions themselves are looked up in every call, as transformers does it.
_lookups: dict[type[nn.Module], tuple[dict[str, Any], str | None]] = {}
live_chains: "weakref.WeakSet[Any]" = weakref.WeakSet()  # chains of variants that are on a module, each with a `base`


def register_base(base: str) -> str:
    """Register the attention and the mask function for a base implementation; idempotent. Returns our name for it."""
    name, flash = seam_name(base), is_flash(base)
    if name in _base_names:
        return name

    def patched_attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> AttentionOutput:
        note_attention(module)
        chain: Any = chain_on(module)
        acts = chain is not None and bool(chain.active or probes_on(module))
        is_hooked = acts and chain.needs_context  # the hook has refused, and seen to the base implementation
        used = base if is_hooked else base_in_force(module, base, run_of(kwargs) if acts else None)
        attend = base_function(type(module), used)
        if flash:
            attend = partial(_as_base_sees, attend, base)
        if not acts:
            return attend(module, query, key, value, attention_mask, **kwargs)
        if PAGED in kwargs:
            refuse_chain(chain)
            kwargs = as_causal(kwargs)
        output: AttentionOutput = chain(ModuleCall(module, query, key, value, attention_mask, kwargs), attend)
        return output

    _base_names[name] = base
    AttentionInterface.register(name, patched_attention)
    if base in AttentionMaskInterface._global_mapping:  # without, transformers builds no mask for the base either

        def patched_mask(*args: Any, **kwargs: Any) -> Any:
            return ALL_MASK_ATTENTION_FUNCTIONS[base](*args, **kwargs)

        AttentionMaskInterface.register(name, patched_mask)
    return name


def base_in_force(module: nn.Module, base: str, run: ModelRun | None) -> str:
    """The base implementation that the model's configuration names in this call.

    It is another than `base`, that of the latest call, where `set_attn_implementation` or `generate` itself (Whisper,
    for time stamps) has set one since: the module is pointed at that. Within one `run` it stays what it is.

    Raises:
        RuntimeError: its own code asks for the implementation's name, and has not been shown the new one.
    """
    config = original_config(module)
    if run is not None and run.base[0] is config and run.base[1] == base:
        return base
    wanted: str = _plainly(config, "_attn_implementation") or "eager"
    if wanted == base:
        if run is not None and run.told:
            run.base = config, base
        return base
    if is_flash(base) or is_flash(wanted) or asks_for_name(module, wanted):
        raise RuntimeError(
            f"This model was patched on the attention implementation {base!r}, and {wanted!r} was set since. "
            f"{type(module).__name__} prepares its call by the implementation's name, so that a patched one cannot "
            "follow: call patchattn.unpatch_model(model), set the implementation, then patch again."
        )
    base_function(type(module), wanted)
    vars(module)["config"] = seam_config(module, wanted)
    for chain in cast(nn.Module, chain_on(module)).modules():  # PEFT keeps one chain per adapter
        if chain in live_chains:
            chain.base = wanted  # type: ignore[assignment]
    return wanted


def keep(chain: PatchedModule) -> None:
    """Have the functions of a chain's base registered, as long as the chain is on a module."""
    if chain.base != INLINE:
        register_base(chain.base)
    live_chains.add(chain)


def let_go(chain: PatchedModule) -> None:
    """The inverse of `keep`."""
    live_chains.discard(chain)


def release() -> None:
    """Take the names out of transformers' registries that no patched model uses any more."""
    used = {chain.base for chain in live_chains}
    for name, base in list(_base_names.items()):
        if base not in used:
            del _base_names[name]
            AttentionInterface._global_mapping.pop(name, None)
            AttentionMaskInterface._global_mapping.pop(name, None)


def base_function(module_class: type[nn.Module], base: str) -> Callable[..., Any]:
    """What the module itself would have called now under `base`: its own eager function, its own registry."""
    if module_class not in _lookups:
        forward = attention_forward(module_class)
        names = [name for name in forward.__code__.co_names if name.endswith("eager_attention_forward")]
        _lookups[module_class] = (forward.__globals__, names[0] if names else None)
    place, eager = _lookups[module_class]
    registry = place[REGISTRY_NAME]
    found: Callable[..., Any] | None = registry.get(base)
    if found is None:  # eager; or the registry says what is wrong
        found = registry.get_interface(base, None if eager is None else place[eager])
    if found is None:
        raise NotImplementedError(f"{module_class.__name__} names no attention function for {base!r}.")
    return found


class _View:
    """An object seen through, but for a few attributes."""

    def __init__(self, target: Any, **attributes: Any) -> None:
        self.__dict__.update(attributes, _target=target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_target"], name)


def _as_base_sees(attend: Callable[..., Any], base: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Flash attention loads the kernel that `module.config` names: show it the base's name there, not ours."""
    return attend(_View(module, config=_View(module.config, _attn_implementation=base)), *args, **kwargs)


def own_config(config: Any) -> Any:
    """A shallow copy of a configuration for one attention module; it remembers which one the model goes on to read."""
    copied = copy.copy(config)
    vars(copied)[_ORIGINAL] = vars(config).get(_ORIGINAL, config)
    return copied


def seam_config(module: nn.Module, base: str) -> Any:
    """An attention module's own copy of its configuration, which names our function."""
    copied, name = own_config(module.config), register_base(base)
    vars(copied)["_attn_implementation_internal"] = AnsweringName(base) if asks_for_name(module, base) else name
    return copied


def original_config(module: nn.Module) -> Any:
    """The configuration that an attention module had before it was patched."""
    config: Any = module.config
    return _plainly(config, "__dict__").get(_ORIGINAL, config)
