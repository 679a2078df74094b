"""The seam: the one function registered with transformers, and the chain of variants it runs.

A patched attention module gets a copy of its configuration that names `patchattn_<base>` as the attention
implementation, where `<base>` is what the model's own configuration names. transformers then calls our function, which
runs the variants attached to the calling module, outermost first, and last the base implementation itself. A module
with nothing attached goes straight to the base.
"""

import copy
import re
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .call import AttentionCall, LayerContext
from .capabilities import needed_capabilities
from .hooks import refuse_later_hooks
from .masks import is_flash
from .packing import CHILD, SETTINGS, packed_settings, refuse_other_settings
from .plan import renamed_config
from .renaming import Renaming
from .sites import REGISTRY_NAME, AttentionSite, attention_forward
from .storage import CacheTap, is_shared, tap_cache
from .variant import ALL_CAPABILITIES, AttentionOutput, Variant, variant_info

_PREFIX = "patchattn_"
_ORIGINAL = "_patchattn_original"  # attribute of a patched module's configuration: the configuration it is a copy of

_base_names: dict[str, str] = {}  # our name -> the base implementation's
# Where a module class looks functions up, and the name of its own eager one: reading them off its code takes long, and
# cannot be traced. The functions themselves are looked up in every call, as transformers does it.
_lookups: dict[type[nn.Module], tuple[dict[str, Any], str | None]] = {}
_live_chains: "weakref.WeakSet[VariantChain]" = weakref.WeakSet()
_local = threading.local()  # .context: the attention module now running in this thread


class VariantChain(nn.Module):
    """The variants attached to one attention module, outermost first; a child of that module.

    Not an nn.ModuleDict: PEFT refuses those in `modules_to_save`.
    """

    def __init__(self, site: AttentionSite, base: str) -> None:
        super().__init__()
        self.site = site
        self.base = base
        self.stores_what_it_attends = False  # seen to be so, of the keys and values that it gives to a kv cache
        self._refresh()
        _live_chains.add(self)

    def attach(self, name: str, variant: Variant) -> None:
        """Append a variant: it becomes the innermost one."""
        self.add_module(name, variant)
        self._refresh()

    def names(self) -> list[str]:
        """Names of the variants, outermost first."""
        return list(self._modules)

    def locate(self, name: str) -> None:
        """Go by the name that the attention module has in the model at hand, which may hold, or be a part of, the one
        that was patched; ValueError if a variant changed what is outside of it."""
        if name != self.site.name:
            renaming = Renaming.of(self.site.name, name)
            for variant in self.variants().values():
                config = renamed_config(variant.config, renaming)
                variant.rename(replace(variant.site, name=name), config, renaming)
            self.site = replace(self.site, name=name)

    def get_extra_state(self) -> torch.Tensor:
        """The variants and their settings as bytes, for the state dict: whatever saves the tensors saves the patch."""
        return self._settings_at(self.site.name)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """ValueError unless the tensors that come with it are of the same variants with the same settings."""
        refuse_other_settings(self.site.name, state, self.get_extra_state())

    def _settings_at(self, module: str) -> torch.Tensor:
        variants = [
            {"patch": variant.number, "variant": name, "config": variant.config.to_dict()}
            for name, variant in self.variants().items()
        ]
        return packed_settings(module, self.site.name, variants)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + SETTINGS] = self._settings_at(prefix.split(f"{CHILD}.")[0].rstrip("."))

    def variants(self) -> dict[str, Variant]:
        """The variants by name, outermost first."""
        return {name: self._variant(name) for name in self.names()}

    def _variant(self, name: str) -> Variant:
        return cast(Variant, self._modules[name])

    def _refresh(self) -> None:
        active = [(name, v) for name in self.names() if not (v := self._variant(name)).is_identity]
        self.active = tuple(name for name, _ in active)
        self.needs_context = any(v.needs_context or v.changes_cache or v.keeps_state for _, v in active)
        self.storing = tuple(name for name, v in active if v.changes_cache)
        self.taps_cache = any(v.changes_cache or v.keeps_state for _, v in active)
        self.lacking = {
            name: missing
            for name, _ in active
            if (missing := frozenset(ALL_CAPABILITIES - variant_info(name).capabilities))
        }

    def __setstate__(self, state: dict[str, Any]) -> None:  # a copy or an unpickled chain needs the registration too
        super().__setstate__(state)
        register_base(self.base)
        _live_chains.add(self)

    def forward(
        self,
        base: Callable[..., Any],
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        kwargs: dict[str, Any],
    ) -> AttentionOutput:
        context = _current_context(module) if self.needs_context else None
        call = AttentionCall(query, key, value, mask, kwargs, module, self.site, self.base, context)
        self._refuse(call)
        if self.storing and context is not None:
            call = self._store(call, context)
        output = self._attend(0, base, call)
        if context is not None:
            context.rows_done += query.shape[2]
        return output

    def _attend(self, depth: int, base: Callable[..., Any], call: AttentionCall) -> AttentionOutput:
        if depth == len(self.active):
            module = _as_base_sees(call.module, self.base) if is_flash(self.base) else call.module
            return base(module, call.query, call.key, call.value, call.attention_mask, **call.kwargs)

        def inner(inner_call: AttentionCall) -> AttentionOutput:
            return self._attend(depth + 1, base, inner_call)

        if depth + 1 == len(self.active):
            call = call.replace(innermost=True)
        return self._variant(self.active[depth])("attend", call, inner)

    def _store(self, call: AttentionCall, context: LayerContext) -> AttentionCall:
        """Without a cache the new keys and values are all there are; with one, the tap has changed them already."""
        tap, fault = context.tap, None
        if self.site.shares_keys and is_shared(call.key, context):
            fault = "shares its keys and values with other layers"
        elif tap is not None and tap.is_used:
            fault = tap.fault(call.key, call.value)
        elif tap is not None and not tap.covers(call.key) and not self.site.is_cross:
            fault = "takes its keys from no layer of its kv cache"
        if fault is not None:
            raise NotImplementedError(
                f"{self.site.module_class} ({self.site.name}) {fault}: {', '.join(map(repr, self.storing))} cannot "
                "change what is stored so that cached and uncached calls agree. Leave it out with modules=... or "
                "layers=..., or choose settings that leave keys and values as they are."
            )
        if tap is not None and tap.covers(call.key):
            return call
        visible = call.visible_keys()
        key, value = self.before_cache(call.key, call.value, context, visible)
        return call.replace(key=key, value=value)

    def before_cache(
        self, key: torch.Tensor, value: torch.Tensor, context: LayerContext, visible: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Let every variant change new keys and values, outermost first."""
        if not self.site.is_cross and context.memory is not None and context.memory is not context.layer_input:
            raise NotImplementedError(
                f"{self.site.module_class} ({self.site.name}) mixes its own sequence with another one in its keys; "
                f"{', '.join(map(repr, self.storing))} cannot tell which key is whose. Leave it out with modules=..."
            )
        # A token of another sequence, or one whose queries are pooled, is seen by whoever sees that sequence.
        if self.site.is_cross or visible.shape[1] != key.shape[2]:
            visible = visible.amax(dim=1, keepdim=True)
        if visible.dim() == 3:
            visible = _of_kv_heads(visible, key.shape[1], self.site)
        for name in self.storing:
            key, value = self._variant(name)("before_cache", key, value, context, visible)
        return key, value

    def _refuse(self, call: AttentionCall) -> None:
        """Name what this call needs and cannot get, before anything is computed."""
        site, implementation = self.site, original_config(call.module)._attn_implementation or "eager"
        if implementation != self.base:
            raise RuntimeError(
                f"This model was patched on the attention implementation {self.base!r}, and {implementation!r} was set "
                "since. Call patchattn.unpatch_model(model), set the implementation, then patch again."
            )
        if site.query_heads is not None and call.query.shape[1] != site.query_heads:
            raise NotImplementedError(
                f"{site.module_class} ({site.name}) was patched as {site.query_heads} query heads but is called with "
                f"{call.query.shape[1]}. Tensor parallel shards are not supported."
            )
        if call.kwargs.get("cache") is not None:
            raise NotImplementedError("Continuous batching (a paged kv cache) is not supported on a patched model.")
        for name, lacking in self.lacking.items():
            if needed := lacking & needed_capabilities(call):
                raise NotImplementedError(
                    f"The variant {name!r} does not support {', '.join(sorted(needed))}, which {site.module_class} "
                    f"({site.name}) needs in this call. See patchattn.variant_info({name!r}).capabilities."
                )


def _of_kv_heads(visible: torch.Tensor, kv_heads: int, site: AttentionSite) -> torch.Tensor:
    """`(B or 1, T, G)` numbers of keys that tokens see by kv head, of those by query head `(B or 1, T, H)`."""
    groups = visible.unflatten(-1, (kv_heads, -1))
    alike = groups.shape[-1] == 1 or (
        not torch.compiler.is_compiling() and bool((groups == groups[..., :1]).all())  # which waits for the device
    )
    if not alike:
        raise NotImplementedError(
            f"The mask of {site.module_class} ({site.name}) differs between query heads that share keys and values: "
            "under such a mask per head a token sees no one number of keys that its key and value could be scaled by."
        )
    return groups[..., 0]


def active_chain(child: nn.Module) -> VariantChain:
    """The chain that computes: PEFT's `modules_to_save` keeps the attached one and a copy per adapter in a wrapper."""
    wrapper = cast(Any, child)
    if isinstance(child, VariantChain):
        return child
    if wrapper.disable_adapters or not wrapper.active_adapters:
        return cast(VariantChain, wrapper.original_module)
    return cast(VariantChain, wrapper.modules_to_save[wrapper.active_adapters[0]])


def seam_name(base: str) -> str:
    """The name registered for a base implementation: no "/" or "@", which transformers takes for a Hub kernel."""
    return _PREFIX + re.sub(r"[^0-9a-zA-Z]+", "_", base)


def register_base(base: str) -> str:
    """Register the attention and the mask function for a base implementation; idempotent. Returns our name for it."""
    name = seam_name(base)
    if name in _base_names:
        return name

    shown = _as_base_sees if is_flash(base) else None

    def patched_attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> AttentionOutput:
        attend = base_function(type(module), base)
        chain = module._modules.get(CHILD)
        if chain is not None and chain.active:
            return chain(attend, module, query, key, value, attention_mask, kwargs)
        return attend(shown(module, base) if shown else module, query, key, value, attention_mask, **kwargs)

    _base_names[name] = base
    AttentionInterface.register(name, patched_attention)
    if base in AttentionMaskInterface._global_mapping:  # without, transformers builds no mask for the base either

        def patched_mask(*args: Any, **kwargs: Any) -> Any:
            return ALL_MASK_ATTENTION_FUNCTIONS[base](*args, **kwargs)

        AttentionMaskInterface.register(name, patched_mask)
    return name


def release_bases() -> None:
    """Take the names out of transformers' registries that no patched model uses any more."""
    used = {chain.base for chain in _live_chains}
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
    found: Callable[..., Any] | None = place[REGISTRY_NAME].get_interface(base, None if eager is None else place[eager])
    if found is None:
        raise NotImplementedError(f"{module_class.__name__} names no attention function for {base!r}.")
    return found


class _View:
    """An object seen through, but for a few attributes."""

    def __init__(self, target: Any, **attributes: Any) -> None:
        self.__dict__.update(attributes, _target=target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_target"], name)


def _as_base_sees(module: nn.Module, base: str) -> Any:
    """Flash attention loads the kernel that `module.config` names: show it the base's name there, not ours."""
    return _View(module, config=_View(module.config, _attn_implementation=base))


def _current_context(module: nn.Module) -> LayerContext:
    context = getattr(_local, "context", None)
    if context is None or context.module is not module:
        raise RuntimeError(
            f"{type(module).__name__} was not called as a module, so that its hooks did not run; a patched attention "
            "module must be called, not its forward method."
        )
    return context


def open_context(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pre-hook of a patched module: note what it is called with, and tap its cache where a variant needs that."""
    chain = cast(VariantChain, module._modules[CHILD])  # or PEFT's wrapper around one, which passes attributes on
    if not torch.compiler.is_compiling():
        refuse_later_hooks(module)
    site = chain.site
    values = {**dict(zip(site.arguments, args, strict=False)), **kwargs}
    cache_argument, cache = next(((name, v) for name, v in values.items() if isinstance(v, Cache)), (None, None))
    context = LayerContext(
        module=module,
        layer_input=values[site.input_argument],
        memory=values.get(site.memory_argument) if site.memory_argument else None,
        attention_mask=values.get(site.mask_argument) if site.mask_argument else None,
        arguments=values,
        cache=cache,
    )
    _local.context = context
    if cache is None or cache_argument is None or not chain.taps_cache:
        return None
    context.tap = CacheTap(context, chain)
    tapped = tap_cache(cache, context.tap)
    if cache_argument in kwargs:
        return args, {**kwargs, cache_argument: tapped}
    position = site.arguments.index(cache_argument)
    return (*args[:position], tapped, *args[position + 1 :]), kwargs


def close_context(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Post-hook of a patched module, called also where it failed: let go of the tensors."""
    context: LayerContext | None = getattr(_local, "context", None)
    _local.context = None
    if context is not None and context.tap is not None:
        context.tap.close()


def note_raw_query(norm: nn.Module, args: tuple[Any, ...]) -> None:
    """Pre-hook of a query norm: keep what it is about to normalise."""
    context = getattr(_local, "context", None)
    if context is not None:
        context.raw_query = args[0]


def own_config(config: Any) -> Any:
    """A shallow copy of a configuration for one attention module; it remembers which one the model goes on to read."""
    copied = copy.copy(config)
    vars(copied)[_ORIGINAL] = vars(config).get(_ORIGINAL, config)
    return copied


def seam_config(config: Any, base: str) -> Any:
    """An attention module's own copy of a configuration, which names our function."""
    copied = own_config(config)
    vars(copied)["_attn_implementation_internal"] = register_base(base)
    return copied


def original_config(module: nn.Module) -> Any:
    """The configuration that an attention module had before it was patched."""
    return vars(module.config).get(_ORIGINAL, module.config)
