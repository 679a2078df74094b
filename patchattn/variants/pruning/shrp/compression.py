"""From SHRP's training form to its static one: `compress`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from ....core.hooks import remove_hooks
from ....core.host import find_sites
from ....core.patching import active_chains, applied_patches, is_ours
from ....core.selection import base_model
from .expander import check_kept, heads_by_module, parse_kept
from .variant import SHRP

ModelT = TypeVar("ModelT", bound=nn.Module)


def compress(model: ModelT, *, heads: Mapping[Any, Sequence[int]] | Sequence[int] | None = None) -> ModelT:
    """Turn a model patched with `shrp` from the training form into the static one, in place.

    Of every converted layer, queries, keys and values are cut to the heads that were used most while training, as many
    as `heads` of its settings says; the router is dropped. A kept head's mean gate goes into its values. What is left
    needs no hooks, and plain attention runs it. `unpatch_model` still restores the original layers.

    Args:
        model: patched with `shrp` and trained.
        heads: heads to keep instead: a list for all, or a mapping from layers or names of attention modules.

    Returns:
        The same model. Its queries, keys and values are new parameters: make optimizers afterwards.

    Raises:
        ValueError: there is no training form of `shrp`, other variants are on its layers, the model carries adapters,
            no head was used, or heads do not fit. The model is then as it was.
        TypeError: `model` is not a transformers model.

    Examples:
        >>> from transformers import BertConfig, BertModel
        >>> import patchattn, torch
        >>> model = BertModel(BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...     num_attention_heads=4, vocab_size=64))
        >>> model = patchattn.patch_model(model, "shrp").train()
        >>> _ = model(torch.randint(64, (2, 8)))  # training goes here
        >>> model = compress(model).eval()
        >>> model.encoder.layer[0].attention.self.query.out_features
        8
    """
    base = base_model(model)
    if hasattr(base, "peft_config"):
        raise ValueError("The model carries adapters: merge_and_unload() before compress.")
    chains = {
        name: chain
        for name, chain in active_chains(base).items()
        if any(isinstance(variant, SHRP) and variant.routes for variant in chain.children())
    }
    if not chains:
        raise ValueError(f"{type(base).__name__} has no layer in SHRP's training form; nothing to compress.")
    variants: dict[str, SHRP] = {}
    for name, chain in chains.items():
        if others := [other for other in chain.names() if other != "shrp"]:
            raise ValueError(f"{name} also has the variant {others[0]!r}: compress first, then patch it.")
        variants[name] = chain.get_submodule("shrp")  # type: ignore[assignment]
    kept = _kept(variants, heads)
    cuts = {name: _cuts(base, variant, kept[name]) for name, variant in variants.items()}
    for patch in applied_patches(base):
        own = {name: kept[name] for name in patch.sites if name in kept}
        config: Any = patch.config
        if own:
            config = replace(config, kept=own)
        for name in own:
            variants[name].make_static(config, cuts[name])
    for changes in cuts.values():
        for change in changes:
            change.exchange(base)
    sites = {site.name: site for site in find_sites(base)}
    for name, chain in chains.items():
        chain.site = sites[name]
        chain.attach("shrp", variants[name])  # it no longer needs the layer's input
        remove_hooks(base.get_submodule(name), is_ours)
    return model


def reset_usage(model: nn.Module) -> None:
    """Start to count anew how often the heads of SHRP's training form are used, as before its second stage.

    Raises:
        ValueError: there is no training form of `shrp`.
    """
    variants = [module for module in model.modules() if isinstance(module, SHRP) and module.routes]
    if not variants:
        raise ValueError(f"{type(model).__name__} has no layer in SHRP's training form; nothing is counted.")
    for variant in variants:
        variant.usage.zero_()
        variant.gate_sum.zero_()


def _kept(variants: Mapping[str, SHRP], heads: Any) -> dict[str, list[int]]:
    """The heads to keep of every layer."""
    if heads is not None:
        kept = heads_by_module(parse_kept(heads), [variant.site for variant in variants.values()])
        for name, chosen in kept.items():
            check_kept(chosen, variants[name].config.heads)
            if chosen[-1] >= (variants[name].site.query_heads or 0):
                raise ValueError(f"{name} has {variants[name].site.query_heads} heads, counted from 0; got {chosen}.")
        return kept
    if unused := [name for name, variant in variants.items() if not int(variant.usage.sum())]:
        raise ValueError(
            f"No head of {unused[0]} was used in training mode, so that none can be chosen: train first, or name them "
            "with heads=..."
        )
    return {name: variant.most_used() for name, variant in variants.items()}


def _cuts(model: nn.Module, variant: SHRP, kept: Sequence[int]) -> list[Any]:
    """The cuts of a layer that is converted: they are worked out on the layer as it was."""
    variant.exchange(model)
    try:
        return variant.cuts(model, kept)
    finally:
        variant.exchange(model)
