"""`patch_model` and its inverse."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from .chain import VariantChain, active_chain, recall, retire
from .fitting import fitted, settings_per_variant
from .hooks import install_hooks, remove_hooks
from .host import find_sites, host
from .notices import note_patched, note_releases, note_unpatched
from .packing import CHILD
from .patch_embedding import GridReader, install_grid, patch_embedding
from .plan import Patch, gathered
from .probe import forget_probes, refuse_probed
from .registry import variant_info
from .selection import base_model, expect_model
from .settings import nearest
from .shards import in_step, joined, refuse_uneven
from .sites import AttentionSite
from .unfitting import refuse_groups, refuse_order, refuse_shared, refuse_site, refuse_two_on_logits
from .variant import Variant, VariantConfig, VariantInfo

ModelT = TypeVar("ModelT", bound=nn.Module)


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
        ValueError: unknown variant, setting or layer, a pattern that matches nothing, the variant is there already, or
            a probe is on the model.
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
    expect_model("patch_model", model)
    if layers_to_transform is not None:
        if layers is not None:
            raise ValueError("Give layers or layers_to_transform, not both: they are two names of one thing.")
        layers = layers_to_transform
    base = base_model(model)
    with in_step(base):
        chosen = settings_per_variant(variant, config, settings)
    with in_step(base):
        patches = fitted(base, chosen, layers, modules)
    apply_patches(base, patches)
    note_patched(base, patches)
    return model


class Built(NamedTuple):
    """A variant that is made for an attention module, and not on it yet.

    Attributes:
        name: of the variant.
        site: name of the attention module.
        variant: the module, for all heads.
        part: the same for the heads that this process holds, where several processes share them.
    """

    name: str
    site: str
    variant: Variant
    part: Variant | None = None


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
    with in_step(model, [patch.to_dict() for patch in patches]):
        for name in names:
            if name not in known:
                raise ValueError(f"{type(model).__name__} has no attention module {name!r}{nearest(name, list(known))}")
        refuse_probed(model)
        host().refuse_bases(model, names)
        refuse_two_on_logits([*applied_patches(model), *patches])
        now, built = _built(model, patches, known, initialise)
    for one in built:
        _attach(model.get_submodule(one.site), now[one.site], one)
    _install(model, [model.get_submodule(name) for name in names])


def _built(
    model: nn.Module,
    patches: Sequence[Patch],
    known: Mapping[str, AttentionSite],
    initialise: Callable[[dict[str, torch.Tensor]], None] | None,
) -> tuple[Mapping[str, AttentionSite], list[Built]]:
    """Everything that is put on a model, and its sites then. It is not touched, so that a failure leaves it as it was.

    What exchanges parts of the model is the exception: who comes after must find the new shapes.
    """
    numbers = [variant.number for chain in active_chains(model).values() for variant in chain.variants().values()]
    built: list[Built] = []
    exchanged: list[Variant] = []
    try:
        for number, patch in enumerate(patches, 1 + max(numbers, default=-1)):
            added = _build(model, patch, number, known, built)
            built += added
            for one in added:
                one.variant.exchange(model)
                exchanged.append(one.variant)
            if variant_info(patch.variant).variant.exchanges():
                known = {site.name: site for site in find_sites(model)}
        if initialise is not None:
            initialise(_values(model, built))
    except BaseException:
        for variant in reversed(exchanged):
            variant.exchange(model)
        raise
    return known, built


def _build(
    model: nn.Module, patch: Patch, number: int, known: Mapping[str, AttentionSite], before: Sequence[Built]
) -> list[Built]:
    """The variants of one patch, made for the model as it is now, which is not touched."""
    info, built = variant_info(patch.variant), []
    for name in patch.sites:
        there = _taken(model, name, before)
        refuse_order(patch.variant, name, list(there))
        refuse_site(info, known[name])
        variant = _made(info, patch.config, known[name], model, number)
        refuse_groups(info.name, variant, there)
        if (shard := known[name].shard) is None:
            one = Built(info.name, name, variant)
        else:
            refuse_shared(info.name, variant, known[name])
            with torch.random.fork_rng(devices=[]):  # numbers drawn from here on are those of one process
                part = _made(info, patch.config, known[name].part(), model, number)
            refuse_uneven(info.name, variant, part, shard.ranks)
            one = Built(info.name, name, variant, part)
        (one.part or variant).prepare(model)
        if variant.needs_grid:
            patch_embedding(model, known[name], known)
        built.append(one)
    return built


def _made(info: VariantInfo, config: VariantConfig, site: AttentionSite, model: nn.Module, number: int) -> Variant:
    """A variant for an attention module, or for a part of its heads."""
    variant = _like(info.variant(config, site), model.get_submodule(site.name))
    variant.number = number
    return variant


def _values(model: nn.Module, built: Sequence[Built]) -> dict[str, torch.Tensor]:
    """What a patch is saved with, by names in the model's state dict: of the variants, and of what they exchanged."""
    own = {
        f"{one.site}.{CHILD}.{one.name}.{key}": tensor
        for one in built
        for key, tensor in one.variant.state_dict().items()
    }
    return {**own, **{name: model.get_parameter(name).detach() for one in built for name in one.variant.carried()}}


def unpatch_model(model: ModelT) -> ModelT:
    """Take every patch off a model: outputs, parameters, configuration and hooks are those of before, bit for bit.

    Raises:
        ValueError: the model is not patched, or a probe is on it; or weights that a patch took out were not saved with
            the model, or carry an adapter.
        TypeError: `model` is not a module.
    """
    expect_model("unpatch_model", model)
    base = base_model(model)
    if not is_patched(base):
        raise ValueError(f"{type(base).__name__} is not patched; nothing to undo.")
    refuse_probed(base)
    variants = [variant for chain in active_chains(base).values() for variant in chain.variants().values()]
    for variant in variants:
        variant.check_undo(base)
    for variant in reversed(variants):
        variant.exchange(base)
    for module in base.modules():
        if (child := module._modules.pop(CHILD, None)) is not None:
            host().disconnect(module)
            retire(child)
        remove_hooks(module, is_ours)
        host().forget(module)
    host().release()
    note_unpatched(base)
    return model


def share_out(model: nn.Module) -> None:
    """Give each process the part of the variants that is for its heads, where heads were shared out under a patch."""
    if not any(site.shard is not None for site in find_sites(model)):
        return
    chains, patches = active_chains(model), applied_patches(model)
    known = {
        f"{name}.{CHILD}.{key}": t.detach() for name, chain in chains.items() for key, t in chain.tensors().items()
    }
    unpatch_model(model)

    def fill(wanted: dict[str, torch.Tensor]) -> None:
        for name, tensor in wanted.items():
            tensor.copy_(known[name])

    apply_patches(model, patches, fill)


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
        for _, child in children:
            for variant in active_chain(child).variants().values():
                variant.exchange(base)
        _install(base, [module for module, _ in children])
        refuse_probed(base)


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
        (variant.number, variant_name, variant.config, name)
        for name, chain in active_chains(model).items()
        for variant_name, variant in chain.variants().items()
    )


def _taken(model: nn.Module, name: str, built: Sequence[Built]) -> dict[str, Variant]:
    """The variants of an attention module by name, those that are being added included."""
    chain = model.get_submodule(name)._modules.get(CHILD)
    if chain is not None and not isinstance(chain, VariantChain):
        raise ValueError(
            f"The variants of {name} are wrapped by {type(chain).__name__}. Patch before that wrapper is made, or "
            "unload it first."
        )
    there = chain.variants() if chain else {}
    return {**there, **{one.name: one.variant for one in built if one.site == name}}


def is_ours(hook: Any) -> bool:
    return host().owns(hook) or isinstance(getattr(hook, "__self__", None), Variant | GridReader)


def _like(variant: Variant, module: nn.Module) -> Variant:
    """A variant on the device, in the floating dtype and in the mode of the module it goes to."""
    reference = next((p for p in module.parameters() if p.is_floating_point()), None)
    if reference is not None and not any(p.is_meta for p in variant.parameters()):
        # accelerate keeps the parameters of an offloaded module elsewhere: its hooks know where it computes
        hooks = [hook for child in module.modules() if (hook := getattr(child, "_hf_hook", None)) is not None]
        device = next((d for h in hooks if (d := getattr(h, "execution_device", None)) is not None), reference.device)
        variant = variant.to(device=device if reference.is_meta else reference.device, dtype=reference.dtype)
    return variant.train(module.training)


def _attach(module: nn.Module, site: AttentionSite, built: Built) -> None:
    if CHILD not in module._modules:
        forget_probes(module)  # what a copy of a probed model keeps of it
        module.add_module(CHILD, VariantChain(site.part(), host().base_of(module)).train(module.training))
    chain: Any = module._modules[CHILD]
    chain.site = site.part()  # as the last surgery leaves it
    chain.attach(built.name, built.variant if built.part is None else joined(built.variant, built.part, module))


def _install(model: nn.Module, modules: list[nn.Module]) -> None:
    """Connect attention modules with the variants that they carry, and place the hooks that these need."""
    for module in modules:
        chain: Any = module._modules[CHILD]
        recall(chain)
        host().connect(model, module)
        install_hooks(model, active_chain(chain))
        if active_chain(chain).needs_grid:
            install_grid(model, active_chain(chain).site, [site.name for site in find_sites(model)])
