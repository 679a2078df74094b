"""The chain of variants on an attention module, which the host calls in place of the base implementation."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from .apart import attend_apart
from .call import AttentionCall
from .capabilities import needed_capabilities
from .context import current_context
from .host import host
from .mask import Mask
from .module_call import ModuleCall
from .packing import CHILD, SETTINGS, packed_settings, refuse_other_settings
from .plan import renamed_config
from .probe import Looks, probes_on
from .ranks import NOTHING_TOLD
from .registry import variant_info
from .renaming import Renaming
from .sites import AttentionSite
from .surroundings import LayerContext, Surroundings
from .tap import is_shared
from .variant import ALL_CAPABILITIES, AttentionOutput, Variant

_NO_LOOKS = Looks()


class VariantChain(nn.Module):
    """The variants attached to one attention module, outermost first; a child of that module.

    Not an nn.ModuleDict: PEFT refuses those in `modules_to_save`.
    """

    def __init__(self, site: AttentionSite, base: str) -> None:
        super().__init__()
        self.site = site
        self.base = base
        self.hides_later: bool | None = None  # seen to be so, of scores that an inline module computes
        self.stores_what_it_attends = False  # seen to be so, of the keys and values that it gives to a kv cache
        self._refresh()
        host().keep(self)

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

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the variants have learnt or counted, by names in this module: the tensors themselves."""
        return {
            f"{variant_name}.{name}": tensor
            for variant_name, variant in self.variants().items()
            for name, tensor in variant.state_dict(keep_vars=True).items()
        }

    def _variant(self, name: str) -> Variant:
        variant: Variant = self._modules[name]  # type: ignore[assignment]
        return variant

    def _refresh(self) -> None:
        active = [(name, v) for name in self.names() if not (v := self._variant(name)).is_identity]
        self.active = tuple(name for name, _ in active)
        self.telling = tuple(name for name, v in active if type(v).key_facts is not Variant.key_facts)
        self.ruling = tuple(name for name, v in active if type(v).rule is not Variant.rule)
        self.taps_cache = bool(self.telling) or any(v.changes_cache or v.keeps_state for _, v in active)
        self.needs_grid = any(v.needs_grid for _, v in active)
        is_followed = self.site.inline and bool(active)
        self.needs_context = (
            is_followed or self.taps_cache or self.needs_grid or any(v.needs_context for _, v in active)
        )
        self.own_weights = tuple(variant_info(name).innermost for name, _ in active)
        self.needs_own_cache = tuple(name for name, v in active if self._ahead(name, v) or not v.batches_continuously)
        self.storing = tuple(name for name, v in active if v.changes_cache)
        self.lacking = {
            name: missing
            for name, _ in active
            if (missing := frozenset(ALL_CAPABILITIES - variant_info(name).capabilities))
        }

    @staticmethod
    def _ahead(name: str, variant: Variant) -> bool:
        return variant_info(name).looks_ahead or bool(variant.config.looks_ahead)

    def __setstate__(self, state: dict[str, Any]) -> None:  # a copy or an unpickled chain needs the registration too
        super().__setstate__(state)
        self.come_alive()

    def come_alive(self) -> None:
        """It is on a module: what its base implementation needs stays."""
        host().keep(self)

    def forward(self, given: ModuleCall, base: Callable[..., Any]) -> AttentionOutput:
        probes = probes_on(given.module)
        looks = Looks(probes, self.own_weights) if probes else _NO_LOOKS
        context = current_context(given.module) if self.needs_context or looks.probes else None
        layer: Any = None if context is None or context.tap is None else context.tap.layer
        if getattr(layer, "apart", None) is None:  # which a layer that is tracked has
            output = self._attend_heads(given, base, context, looks)
        else:
            output = attend_apart(
                given,
                layer.keys,
                layer.apart,
                self.site,
                self.active,
                lambda part, is_apart: self._attend_heads(part, base, context, looks, are_some=True, is_apart=is_apart),
            )
        if context is not None:
            context.rows_done += given.query.shape[2]
        return output

    def _attend_heads(
        self,
        given: ModuleCall,
        base: Callable[..., Any],
        context: LayerContext | None,
        looks: Looks,
        *,
        are_some: bool = False,
        is_apart: bool = False,
    ) -> AttentionOutput:
        """One call of all heads, or of those whose keys are in one layer of the kv cache."""
        call = attention_call(given, self.site, self.base, context, is_apart=is_apart)
        if len(self.active) == 1:
            call.innermost, call.is_last = not (looks.probes and looks.reaches_base), True
        self._refuse(call, are_some)
        if self.storing and context is not None:
            call = self._store(call, context)
        for name in self.telling:
            told = self._variant(name)("key_facts", call)
            if told:
                call = call.replace(facts={**call.facts, **call.context.remembered(name, told)})
        for name in self.ruling:
            call = call.seeing(self._variant(name)("rule", call))
        if looks.probes and looks.at_base:
            return self._attend_through(base, call, looks)
        return self._attend(base, looks, 0, call)

    def _attend_through(self, base: Callable[..., Any], call: AttentionCall, looks: Looks) -> AttentionOutput:
        """Attend, and refuse where the base implementation, which a probe looks at, was left out."""
        calls = 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return base(*args, **kwargs)

        output = self._attend(counted, looks, 0, call)
        if not calls:
            raise NotImplementedError(
                f"{', '.join(map(repr, self.active))} computed a call of {self.site.name} without the base "
                'implementation, so that a probe has nothing to look at there: use at="model", or load the model with '
                'attn_implementation="eager".'
            )
        return output

    def _attend(self, base: Callable[..., Any], looks: Looks, depth: int, call: AttentionCall) -> AttentionOutput:
        """A call behind so many variants."""
        if depth == len(self.active):
            mask, words = call.mask.rendered()
            kwargs = {**call.kwargs, **words} if words else call.kwargs
            output, weights = base(call.module, call.query, call.key, call.value, mask, **kwargs)
        else:
            if depth + 1 == len(self.active) and not call.is_last:
                call = call.replace(innermost=not looks.reaches_base, is_last=True)
            inner = partial(self._attend, base, looks, depth + 1)
            variant: Any = self._modules[self.active[depth]]
            output, weights = variant("attend", call, inner)
        return looks.shown(depth, call, output, weights) if looks.probes else (output, weights)

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
        key, value = self.before_cache(call.key, call.value, context, call.mask)
        return call.replace(key=key, value=value)

    def mask_before_cache(self, context: LayerContext, key: torch.Tensor, keys: int, own: int | None) -> Mask:
        """The mask of a call whose new keys `(B, Hkv, T, D)` are on their way into a cache that then gives `keys`, the
        first of which has the place `own`, where that is known: the one that attention is then called with, if nothing
        in between makes it another."""
        batch, length = context.layer_input.shape[:2]
        return host().mask_of_call(
            context.attention_mask,
            self.base,
            context.arguments,
            is_causal=bool(getattr(context.module, "is_causal", True)),
            is_cross=self.site.is_cross,
            batch=batch,
            heads=self.site.query_heads or key.shape[1],
            queries=length,
            keys=keys,
            window=window_of(context.module),
            own=own,
            told=context.told,
            device=key.device,
            dtype=key.dtype,
        )

    def before_cache(
        self, key: torch.Tensor, value: torch.Tensor, context: LayerContext, mask: Mask
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Let every variant change new keys and values, outermost first; `mask` says who sees them."""
        context.mask, visible = mask, mask.counts()
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
            variant: Any = self._modules[name]
            key, value = variant("before_cache", key, value, context, visible)
        return key, value

    def _refuse(self, call: AttentionCall, are_some: bool) -> None:
        """Name what this call needs and cannot get, before anything is computed."""
        site = self.site
        if site.query_heads is not None and call.query.shape[1] != site.query_heads and not are_some:
            raise NotImplementedError(
                f"{site.module_class} ({site.name}) was patched as {site.query_heads} query heads but is called with "
                f"{call.query.shape[1]}: this process holds a part of them that cannot be told from its projections."
            )
        for name, lacking in self.lacking.items():
            if needed := needed_capabilities(call, lacking):
                raise NotImplementedError(
                    f"The variant {name!r} does not support {', '.join(sorted(needed))}, which {site.module_class} "
                    f"({site.name}) needs in this call. See patchattn.variant_info({name!r}).capabilities."
                )


def attention_call(
    given: ModuleCall, site: AttentionSite, base: str, layer: LayerContext | None = None, *, is_apart: bool = False
) -> AttentionCall:
    """What variants see of a call of an attention function.

    Args:
        given: the call.
        site: what is known of its attention module.
        base: the base implementation.
        layer: what the attention module was called with, where its hooks ran.
        is_apart: whether it is about the heads whose keys are apart.
    """
    query, key, kwargs, module = given.query, given.key, given.kwargs, given.module
    context = Surroundings(module, site, kwargs, query, key, layer, is_apart=is_apart)
    said = kwargs.get("is_causal")
    columns, own, dropped = context.axis_of_keys()
    # Where keys were forgotten in between, the model's mask is about all there ever were.
    keys = key.shape[2] + (0 if columns is None else dropped or 0)
    mask = host().mask_of_call(
        given.mask,
        base,
        kwargs,
        is_causal=bool(getattr(module, "is_causal", True) if said is None else said),
        is_cross=site.is_cross,
        batch=max(query.shape[0], key.shape[0]),
        heads=query.shape[1],
        queries=query.shape[2],
        keys=keys,
        window=kwargs.get("sliding_window"),
        own=own if columns is None else keys - query.shape[2],
        dropped=dropped if columns is None else 0,
        told=NOTHING_TOLD if layer is None else layer.told,
        device=query.device,
        dtype=query.dtype,
    )
    if columns is not None:
        mask = mask.at(columns, has_empty=context.has_empty())
    return AttentionCall(query, key, given.value, mask, kwargs, module, site, base, context)


def window_of(module: Any) -> int | None:
    """The sliding window of a module: its own where the model's layers differ, else the configuration's."""
    if not getattr(module, "is_sliding", True):
        return None
    window: int | None = getattr(
        module, "sliding_window", getattr(getattr(module, "config", None), "sliding_window", None)
    )
    return window


def _of_kv_heads(visible: torch.Tensor, kv_heads: int, site: AttentionSite) -> torch.Tensor:
    """`(B or 1, T, G)` numbers of keys that tokens see by kv head, of those by query head `(B or 1, T, H)`."""
    groups = visible.unflatten(-1, (kv_heads, -1))
    alike = groups.shape[-1] == 1 or (
        not torch.compiler.is_compiling() and bool((groups == groups[..., :1]).all())  # which waits for the device
    )
    if not alike:
        raise NotImplementedError(
            f"The mask of {site.module_class} ({site.name}) differs between query heads that share keys and values: "
            "under such a mask per head there is no single number of keys that a token sees, to scale its key and "
            "value by."
        )
    return groups[..., 0]


def chains_in(child: nn.Module) -> list[VariantChain]:
    """All chains of an attention module: PEFT keeps one per adapter."""
    return [chain for chain in child.modules() if isinstance(chain, VariantChain)]


def retire(child: nn.Module) -> None:
    """A chain that is taken off its module needs no registration, whoever still holds it."""
    for chain in chains_in(child):
        host().let_go(chain)


def recall(child: nn.Module) -> None:
    """The inverse of `retire`."""
    for chain in chains_in(child):
        chain.come_alive()


def active_chain(child: nn.Module, adapter: str | None = None) -> VariantChain:
    """The chain that computes: PEFT's `modules_to_save` keeps the attached one and a copy per adapter in a wrapper.

    Args:
        child: of the attention module.
        adapter: whose copy is meant; the active one by default.
    """
    wrapper = cast(Any, child)
    if isinstance(child, VariantChain):
        return child
    if adapter is not None and adapter in wrapper.modules_to_save:
        return cast(VariantChain, wrapper.modules_to_save[adapter])
    if adapter is not None or wrapper.disable_adapters or not wrapper.active_adapters:
        return cast(VariantChain, wrapper.original_module)
    return cast(VariantChain, wrapper.modules_to_save[wrapper.active_adapters[0]])
