"""`patch_model` and its inverse."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from ..decoding.variant import DecodingVariant, refuse_second
from ..hosts.transformers.bases import base_function, original_config, release_bases, seam_config
from ..hosts.transformers.batching import allow_batching, forbid_batching
from ..hosts.transformers.compatibility import name_branches, seam_name
from ..hosts.transformers.context import close_context, note_raw_query, open_context
from ..hosts.transformers.seam import VariantChain, active_chain, recall, retire
from ..surgery.change import SurgeryVariant, surgeries
from .hooks import install_hooks, register_last, remove_hooks
from .notices import note_patched, note_releases, note_unpatched
from .packing import CHILD
from .plan import Patch, gathered
from .registry import variant_info
from .selection import base_model, select_sites
from .settings import nearest
from .sites import AttentionSite, find_sites
from .variant import Variant, VariantConfig, VariantInfo

ModelT = TypeVar("ModelT", bound=nn.Module)
_HOOKS = (open_context, close_context, note_raw_query)


def patch_model(
    model: ModelT,
    variant: str | Sequence[str],
    config: VariantConfig | Mapping[str, Any] | Mapping[str, Mapping[str, Any]] | None = None,
    *,
    layers: int | Iterable[int] | None = None,
    layers_to_transform: int | Iterable[int] | None = None,
    modules: str | Iterable[str] | None = None,
    **settings: Any,
) -> ModelT:
    """Replace a model's attention by a published variant, in place.

    The model keeps its class, its weights and the attention implementation that computes for it. Patching a patched
    model adds the new variants inside those that are there; the same variant twice on one layer is refused.

    Args:
        model: a transformers model, or a PeftModel around one.
        variant: name of a variant, or several: the first is outermost, sees the model's own queries, keys and values
            and returns last.
        config: settings: a configuration or a dictionary. For several variants, a dictionary from name to settings.
        layers: layer indices, counted from 0 in each tower; all layers by default. Towers with fewer layers are left
            out where the index does not exist, but an index that exists nowhere is an error.
        layers_to_transform: PEFT's name for `layers`; give one of the two.
        modules: regular expression searched in the names of attention modules, such as `language_model` or
            `encoder_attn`, or several, each of which must match one; all attention modules by default. A decoding
            variant chooses for itself.
        settings: settings of a single variant by name, such as `active_ratio=0.75`. `preset="name"`, here or in
            `config`, starts from one of `variant_info(variant).presets`.

    Returns:
        The same model.

    Raises:
        ValueError: unknown variant, setting or layer, a pattern that matches nothing, or the variant is there already.
        TypeError: an argument of the wrong type.
        NotImplementedError: the model's attention does not go through transformers' registry, or the variant lacks
            something that the model needs. The model is then as it was.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        ...     num_attention_heads=4, vocab_size=64))
        >>> model = patch_model(model, "moh", active_ratio=0.75)
        >>> model.model.layers[0].self_attn.patchattn.names()
        ['moh']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch_model expects a model, got {type(model).__name__}.")
    if layers_to_transform is not None:
        if layers is not None:
            raise ValueError("Give layers or layers_to_transform, not both: they are two names of one thing.")
        layers = layers_to_transform
    base = base_model(model)
    chosen = _settings_per_variant(variant, config, settings)
    sites: list[AttentionSite] = []
    if any(not issubclass(info.variant, DecodingVariant) for info, _ in chosen):
        sites = select_sites(base, layers=layers, modules=modules)
    elif layers is not None or modules is not None:
        raise ValueError(
            f"{chosen[0][0].name!r} acts on logits and chooses its own attention modules: leave out layers and modules."
        )
    patches = []
    for info, given in chosen:
        offered = find_sites(base) if issubclass(info.variant, DecodingVariant) else sites
        configured, own = info.fitted(given, base, offered)
        patches.append(Patch(info.name, configured, tuple(site.name for site in own)))
    apply_patches(base, patches)
    note_patched(base, patches)
    return model


def apply_patches(
    model: nn.Module,
    patches: Sequence[Patch],
    initialise: Callable[[dict[str, torch.Tensor]], None] | None = None,
) -> None:
    """Attach patches to a model; the common end of `patch_model` and of loading. All or nothing.

    Args:
        model: a `base_model`.
        patches: outermost first.
        initialise: called with the tensors whose values a patch is saved with, by their names in the model's state
            dict, to fill them in; what it raises leaves the model as it was.
    """
    note_releases()
    known = {site.name: site for site in find_sites(model)}
    names = list(dict.fromkeys(name for patch in patches for name in patch.sites))
    for name in names:
        if name not in known:
            raise ValueError(f"{type(model).__name__} has no attention module {name!r}{nearest(name, list(known))}")
    bases = {name: _base_of(model, name) for name in names}
    for base in dict.fromkeys(bases.values()):
        chosen = [model.get_submodule(name) for name in names if bases[name] == base]
        if questions := name_branches(chosen, base):
            raise NotImplementedError(
                f"{type(model).__name__} cannot be patched under the attention implementation {base!r}: its code asks "
                f"for the implementation by name and would compute something else ({'; '.join(questions)}). Load it "
                "with another attn_implementation."
            )
    existing = applied_patches(model)
    refuse_second([variant_info(patch.variant).variant for patch in (*existing, *patches)])
    # Build everything before touching the model, so that a failure leaves it as it was. Surgery is the exception: who
    # comes after it must find the new shapes.
    built: list[tuple[str, str, Variant]] = []
    done: list[SurgeryVariant] = []
    numbers = [variant.number for chain in active_chains(model).values() for variant in chain.variants().values()]
    try:
        for number, patch in enumerate(patches, 1 + max(numbers, default=-1)):
            operations = []
            for name in patch.sites:
                taken = _taken(model, name, built)
                _refuse_order(patch.variant, name, taken)
                _refuse_site(variant_info(patch.variant), known[name])
                variant = _like(
                    variant_info(patch.variant).variant(patch.config, known[name]), model.get_submodule(name)
                )
                variant.number = number
                if isinstance(variant, DecodingVariant):
                    variant.prepare(model)
                if isinstance(variant, SurgeryVariant):
                    variant.changes = variant.plan(model)
                    operations.append(variant)
                built.append((patch.variant, name, variant))
            for operation in operations:
                operation.exchange(model)
                done.append(operation)
            if operations:
                known = {site.name: site for site in find_sites(model)}
        if initialise is not None:
            own = {f"{name}.{CHILD}.{kind}.{key}": t for kind, name, v in built for key, t in v.state_dict().items()}
            changed = {name: model.get_parameter(name).detach() for operation in done for name in operation.carried()}
            initialise({**own, **changed})
        for name in names:
            base_function(type(model.get_submodule(name)), bases[name])
    except BaseException:
        for operation in reversed(done):
            operation.exchange(model)
        raise
    for kind, name, variant in built:
        _attach(model.get_submodule(name), known[name], bases[name], kind, variant)
    _install(model, [model.get_submodule(name) for name in names])


def unpatch_model(model: ModelT) -> ModelT:
    """Take every patch off a model: outputs, parameters, configuration and hooks are those of before, bit for bit.

    Raises:
        ValueError: the model is not patched; or weights that a patch took out were not saved with the model, or carry
            an adapter.
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch_model expects a model, got {type(model).__name__}.")
    base = base_model(model)
    if not is_patched(base):
        raise ValueError(f"{type(base).__name__} is not patched; nothing to undo.")
    operations = surgeries(list(active_chains(base).values()))
    for operation in operations:
        operation.check_undo(base)
    for operation in reversed(operations):
        operation.exchange(base)
    for module in base.modules():
        if (child := module._modules.pop(CHILD, None)) is not None:
            vars(module)["config"] = original_config(module)
            retire(child)
        remove_hooks(module, is_ours)
        allow_batching(module)
    release_bases()
    note_unpatched(base)
    return model


@contextmanager
def patched(model: ModelT, variant: str | Sequence[str], *args: Any, **kwargs: Any) -> Iterator[ModelT]:
    """`patch_model` for the length of a `with` block; restores the model also after an exception.

    Raises:
        ValueError: the model is patched already: leaving the block could not tell which patch to keep.
    """
    if isinstance(model, nn.Module) and is_patched(model):
        raise ValueError("patched() expects an unpatched model; this one is patched. Call unpatch_model first.")
    patch_model(model, variant, *args, **kwargs)
    try:
        yield model
    finally:
        if is_patched(model):
            unpatch_model(model)


@contextmanager
def unpatched(model: ModelT) -> Iterator[ModelT]:
    """The model without its patches for the length of a `with` block; they come back as they were, trained values too.

    Raises:
        ValueError: the model is not patched.
    """
    base = base_model(model)
    children = [(module, child) for module in base.modules() if (child := module._modules.get(CHILD)) is not None]
    unpatch_model(model)
    try:
        yield model
    finally:
        for module, child in children:
            module.add_module(CHILD, child)
        for operation in surgeries([active_chain(child) for _, child in children]):
            operation.exchange(base)
        _install(base, [module for module, _ in children])


def is_patched(model: nn.Module) -> bool:
    """Whether any attention module of the model carries a variant."""
    return any(CHILD in module._modules for module in model.modules())


def active_chains(model: nn.Module, adapter: str | None = None) -> dict[str, VariantChain]:
    """Name of the attention module to the variants that compute there; `model` is a `base_model`.

    With the name of a PEFT adapter, those that compute where that one is active. The variants go by the names that
    modules have in it from here on, whichever object was patched.
    """
    children = {name: module._modules.get(CHILD) for name, module in model.named_modules()}
    chains = {name: active_chain(child, adapter) for name, child in children.items() if child is not None}
    for name, chain in chains.items():
        chain.locate(name)
    return chains


def applied_patches(model: nn.Module) -> list[Patch]:
    """The patches on a model, outermost first, as its attention modules carry them."""
    return gathered(
        (variant.number, kind, variant.config, name)
        for name, chain in active_chains(model).items()
        for kind, variant in chain.variants().items()
    )


def _settings_per_variant(
    variant: str | Sequence[str], config: Any, settings: Mapping[str, Any]
) -> list[tuple[VariantInfo, Any]]:
    """Pair every variant with its settings."""
    names = [variant] if isinstance(variant, str) else variant
    if not isinstance(names, list | tuple) or not names:
        raise TypeError(f"variant must be a name or a list of names, got {variant!r}.")
    infos = [variant_info(name) for name in names]
    if len(set(names)) != len(names):
        raise ValueError(f"The same variant twice on one layer: {list(names)}.")
    if config is not None and settings:
        raise ValueError(f"Give settings either as config or by name, not both: {', '.join(settings)}.")
    if len(infos) == 1:
        return [(infos[0], dict(settings) if config is None else config)]
    if settings:
        raise ValueError(
            f"With several variants, give settings per name: config={{{names[0]!r}: {dict(settings)!r}, ...}}."
        )
    if config is not None and not isinstance(config, Mapping):
        raise TypeError(f"With several variants, config must map names to settings, got {type(config).__name__}.")
    for name in config or {}:
        if name not in names:
            raise ValueError(f"config has settings for {name!r}{nearest(str(name), list(names))}")
    return [(info, (config or {}).get(info.name, {})) for info in infos]


def _taken(model: nn.Module, name: str, built: Sequence[tuple[str, str, Variant]]) -> list[str]:
    """The variants of an attention module, those that are being added included."""
    chain = model.get_submodule(name)._modules.get(CHILD)
    if chain is not None and not isinstance(chain, VariantChain):
        raise ValueError(
            f"The variants of {name} are wrapped by {type(chain).__name__}. Patch before that wrapper is made, or "
            "unload it first."
        )
    return [*(chain.names() if chain else ()), *(kind for kind, place, _ in built if place == name)]


def _refuse_order(variant: str, name: str, taken: Sequence[str]) -> None:
    """ValueError if a variant cannot come after those that an attention module has."""
    info = variant_info(variant)
    if variant in taken:
        raise ValueError(
            f"{name} already has the variant {variant!r}. Call patchattn.unpatch_model(model) first, or choose other "
            "layers."
        )
    last = next((other for other in taken if variant_info(other).innermost), None)
    if last is not None and info.kind == "attention":
        raise ValueError(
            f"{last!r} computes attention weights itself, so that nothing can come after it: put {variant!r} before "
            f"it, as in [{variant!r}, {last!r}]."
        )
    others = [other for other in taken if variant_info(other).kind != "surgery"]
    if others and info.kind == "surgery":
        raise ValueError(
            f"{variant!r} changes the shapes of {name}, which {others[0]!r} was made for: put it first, as in "
            f"[{variant!r}, {others[0]!r}]."
        )


def _refuse_site(info: VariantInfo, site: AttentionSite) -> None:
    needed = {"cross"} if site.is_cross else set()
    if site.query_heads != site.kv_heads:
        needed.add("gqa")
    if lacking := sorted(needed - info.capabilities):
        raise NotImplementedError(
            f"The variant {info.name!r} does not support {', '.join(lacking)}, which {site.module_class} "
            f"({site.name}) needs. Leave it out with modules=... or layers=..."
        )


def is_ours(hook: Any) -> bool:
    return hook in _HOOKS or isinstance(getattr(hook, "__self__", None), Variant)


def _base_of(model: nn.Module, name: str) -> str:
    return original_config(model.get_submodule(name))._attn_implementation or "eager"


def _config(module: nn.Module) -> Any:
    """The configuration of a model or an attention module; nn.Module types every attribute as a tensor."""
    return module.config


def _like(variant: Variant, module: nn.Module) -> Variant:
    """A variant on the device, in the floating dtype and in the mode of the module it goes to."""
    reference = next((p for p in module.parameters() if p.is_floating_point()), None)
    if reference is not None and not any(p.is_meta for p in variant.parameters()):
        # accelerate keeps the parameters of an offloaded module elsewhere: its hooks know where it computes
        hooks = [hook for child in module.modules() if (hook := getattr(child, "_hf_hook", None)) is not None]
        device = next((d for h in hooks if (d := getattr(h, "execution_device", None)) is not None), reference.device)
        variant = variant.to(device=device if reference.is_meta else reference.device, dtype=reference.dtype)
    return variant.train(module.training)


def _attach(module: nn.Module, site: AttentionSite, base: str, name: str, variant: Variant) -> None:
    if CHILD not in module._modules:
        module.add_module(CHILD, VariantChain(site, base).train(module.training))
    chain: Any = module._modules[CHILD]
    chain.site = site  # as the last surgery leaves it
    chain.attach(name, variant)


def _install(model: nn.Module, modules: list[nn.Module]) -> None:
    """Point configurations at the seam and place the hooks that the attached variants need."""
    forbid_batching(model)
    for module in modules:
        chain: Any = module._modules[CHILD]
        recall(chain)
        if _config(module)._attn_implementation != seam_name(chain.base):
            vars(module)["config"] = seam_config(module.config, chain.base)
        if chain.needs_context and open_context not in module._forward_pre_hooks.values():
            register_last(module, open_context)
            module.register_forward_hook(close_context, always_call=True)
            if chain.site.query_norm is not None:
                register_last(module.get_submodule(chain.site.query_norm), note_raw_query, with_kwargs=False)
        install_hooks(model, active_chain(chain))
