"""What a patch may not be: variants in an order, or on an attention module, that they are not made for."""

from collections.abc import Mapping, Sequence

from .plan import Patch
from .registry import variant_info
from .sites import AttentionSite
from .variant import Variant, VariantInfo


def refuse_order(variant: str, name: str, taken: Sequence[str]) -> None:
    """ValueError if a variant cannot come after those that an attention module has."""
    info = variant_info(variant)
    if variant in taken:
        raise ValueError(
            f"{name} already has the variant {variant!r}. Call patchattn.unpatch_model(model) first, or choose other "
            "layers."
        )
    last = next((other for other in taken if variant_info(other).innermost), None)
    if last is not None and info.variant.attends:
        raise ValueError(
            f"{last!r} computes attention weights itself, so that nothing can come after it: put {variant!r} before "
            f"it, as in [{variant!r}, {last!r}]."
        )
    others = [other for other in taken if not variant_info(other).variant.exchanges()]
    if others and info.variant.exchanges():
        raise ValueError(
            f"{variant!r} changes the shapes of {name}, which {others[0]!r} was made for: put it first, as in "
            f"[{variant!r}, {others[0]!r}]."
        )


def refuse_groups(name: str, variant: Variant, others: Mapping[str, Variant]) -> None:
    """NotImplementedError if a variant needs kv heads that serve alike, and one before it on the module leaves others.

    Args:
        name: of the variant.
        variant: made for the module.
        others: those that the module has, by name.
    """
    before = next((other for other, there in others.items() if not there.leaves_groups), None)
    if before is not None and variant.needs_groups and not variant.is_identity:
        raise NotImplementedError(
            f"{name!r}, with these settings, needs kv heads that serve equally many query heads each, and {before!r} "
            f"leaves some of {variant.site.name} more than others. Take out equally many of each (uniform=True), all "
            "of some (groups='kv'), or mask them (physical=False)."
        )


def refuse_two_on_logits(patches: Sequence[Patch]) -> None:
    """ValueError if more than one variant acts on logits."""
    variants = [variant_info(patch.variant).variant for patch in patches]
    decoding = [variant.__name__ for variant in variants if variant.acts_on_logits]
    if len(decoding) > 1:
        raise ValueError(
            f"A model decodes with one decoding variant at a time, got {', '.join(decoding)}. Call "
            "patchattn.unpatch_model(model) first."
        )


def refuse_site(info: VariantInfo, site: AttentionSite) -> None:
    needed = {"cross"} if site.is_cross else set()
    if site.query_heads != site.kv_heads:
        needed.add("gqa")
    if lacking := sorted(needed - info.capabilities):
        raise NotImplementedError(
            f"The variant {info.name!r} does not support {', '.join(lacking)}, which {site.module_class} "
            f"({site.name}) needs. Leave it out with modules=... or layers=..."
        )


def refuse_shared(name: str, variant: Variant, site: AttentionSite) -> None:
    """NotImplementedError if several processes share the heads of an attention module, and a variant needs them all."""
    if site.shard is not None and not (variant.splits_by_head or variant.is_identity):
        raise NotImplementedError(
            f"The variant {name!r}, with these settings, does not support tensor parallelism: {site.name} has "
            f"{site.shard.query_heads} query heads, of which each of {site.shard.ranks} processes holds its own, and "
            "what it computes needs those of all. Load the model without tp_plan: on one device, by device_map, or "
            "sharded by FSDP2."
        )


def refuse_parts(sites: Sequence[AttentionSite], what: str) -> None:
    """NotImplementedError if a process holds some of the heads of an attention module, for who looks at them all."""
    for site in sites:
        if site.shard is not None:
            raise NotImplementedError(
                f"To look at {what}, all heads must be in one process, and of the {site.shard.query_heads} of "
                f"{site.name} each of {site.shard.ranks} processes holds its own: load the model without tp_plan."
            )
