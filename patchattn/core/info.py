"""What a patched model says of itself."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from .host import find_sites
from .patching import active_chains, applied_patches
from .selection import base_model, expect_model


@dataclass(frozen=True, eq=False, repr=False)
class PatchInfo(Mapping[str, Any]):
    """What is patched onto a model, in plain data; `info.patches` and `info["patches"]` are the same.

    Attributes:
        patches: outermost first, each a dictionary of its `variant`, its `config` (the settings) and its `sites` (names
            of attention modules).
        sites: every attention module, patched or not: the fields of `AttentionSite` by name, and `variants`, the names
            of those on it, outermost first.
        base_implementations: what the patched attention modules compute attention with, such as `sdpa`; sorted.
        extra_parameters: number of values that the variants' parameters hold, all together.
    """

    patches: list[dict[str, Any]]
    sites: list[dict[str, Any]]
    base_implementations: list[str]
    extra_parameters: int

    def __getitem__(self, key: str) -> Any:
        return {field.name: getattr(self, field.name) for field in fields(self)}[key]

    def __iter__(self) -> Iterator[str]:
        return iter([field.name for field in fields(self)])

    def __len__(self) -> int:
        return len(fields(self))

    def __repr__(self) -> str:
        on = [f"{patch['variant']} on {len(patch['sites'])} of {len(self.sites)}" for patch in self.patches]
        return (
            f"PatchInfo({', '.join(on) or 'nothing on any of ' + str(len(self.sites))} attention modules, "
            f"{self.extra_parameters} extra parameters)"
        )


def patch_info(model: nn.Module) -> PatchInfo:
    """What is patched, and where it could be.

    Args:
        model: a transformers model, in whatever wrapper, patched or not.

    Raises:
        TypeError: it is not such a model.

    Examples:
        >>> from patchattn import patch_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        ...     num_attention_heads=4, vocab_size=64))
        >>> patch_info(patch_model(model, "ssmax", layers=1))
        PatchInfo(ssmax on 1 of 2 attention modules, 8 extra parameters)
    """
    expect_model("patch_info", model)
    base = base_model(model)
    chains = active_chains(base)
    variants = {name: chain.names() for name, chain in chains.items()}
    return PatchInfo(
        patches=[patch.to_dict() for patch in applied_patches(base)],
        sites=[{**asdict(site), "variants": variants.get(site.name, [])} for site in find_sites(base)],
        base_implementations=sorted({chain.base for chain in chains.values()}),
        extra_parameters=sum(p.numel() for chain in chains.values() for p in chain.parameters()),
    )
