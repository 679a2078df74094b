"""Taking query heads out of an attention module, and calling attention without them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..core.call import AttentionCall
from ..core.heads import HeadList, Heads, plain_heads
from ..core.hooks import Hook
from ..core.kv_caches import find_cache, stored_heads
from ..core.linear import LinearView, selected
from ..core.settings import nearest
from ..core.sites import AttentionSite
from ..hosts.transformers.bases import own_config
from ..hosts.transformers.sites import attention_forward
from .change import Change, SurgeryVariant
from .projections import head_projections, kept_index, unrecognised

# Attributes of attention modules, and fields of configurations, that say how many heads there are, or how wide.
_QUERY_HEADS = ("num_heads", "num_attention_heads", "n_head", "n_heads", "heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_QUERY_WIDTHS = ("split_size", "all_head_size", "embed_dim", "inner_dim", "hidden_size", "q_dim")
_KV_WIDTHS = ("kv_dim",)


def parse_heads(given: Any) -> dict[str, Any]:
    """A head list by layer, in the form of `HeadList.to_dict`; or a dictionary from names of modules to heads."""
    by_name = isinstance(given, Mapping) and any(isinstance(key, str) and not key.isdecimal() for key in given)
    if not by_name or "heads" in given:
        return plain_heads(given)
    # The same checks as for layers, module by module.
    return {name: list(HeadList.parse({0: heads}).heads[0]) for name, heads in given.items()}


def heads_at(heads: Heads | None, module: str) -> tuple[int, ...] | None:
    """Those that settings, once fitted, name for an attention module; `None` where they name none of its heads."""
    found = heads.get(module) if isinstance(heads, dict) else None
    return None if found is None else tuple(found)


def heads_by_module(heads: Heads, model: nn.Module, sites: Sequence[AttentionSite]) -> dict[str, list[int]]:
    """Heads by the name of the attention module, checked against the model."""
    if not isinstance(heads, dict) or "heads" in heads:
        listed = HeadList.parse(heads)
        listed.check(model, sites)
        chosen = {site.name: list(listed.of_site(site)) for site in sites}
    else:
        chosen = dict(heads)
    known = {site.name: site for site in sites}
    for name, numbers in chosen.items():
        if name not in known:
            raise ValueError(f"There is no attention module {name!r} to prune{nearest(name, list(known))}")
        check_heads(known[name], numbers)
    return {name: numbers for name, numbers in chosen.items() if numbers}


def check_heads(site: AttentionSite, pruned: Sequence[int]) -> None:
    """ValueError if these heads, sorted, cannot be taken out of an attention module."""
    count = site.query_heads or 0
    if pruned and pruned[-1] >= count:
        raise ValueError(f"{site.name} has {count} query heads, counted from 0; there is no head {pruned[-1]}.")
    if pruned and len(pruned) == count:
        raise ValueError(f"All {count} query heads of {site.name} would be taken out; a layer must keep at least one.")


def cut_heads(model: nn.Module, site: AttentionSite, kept: Sequence[int]) -> list[Change]:
    """The changes that leave an attention module with some of its query heads, and the kv heads that these need.

    Args:
        model: a transformers model.
        site: the attention module, as it is before.
        kept: query heads to keep, sorted.

    Raises:
        NotImplementedError: its projections are not recognised, are quantised or offloaded.
        ValueError: they carry adapters.
    """
    parts = head_projections(model, site)
    kv_kept = kept_kv_heads(site, kept)
    changes = _alignment(model, site, kept)
    for path in dict.fromkeys(part.projection for part in parts):
        own = [part for part in parts if part.projection == path]
        index = kept_index(own, kept, kv_kept)
        values = LinearView.at(model, path).cut(own[0].side, index)
        changes += [Change(path, name, value) for name, value in values.items()]
    module: Any = model.get_submodule(site.name)
    if "sinks" in module._parameters:
        changes.append(Change(site.name, "sinks", selected(module.sinks, 0, torch.tensor(kept, device="cpu"))))
    changes += [Change(site.name, name, value) for name, value in sizes_of_heads(module, site, kept, kv_kept).items()]
    return changes


def kept_kv_heads(site: AttentionSite, kept: Sequence[int]) -> list[int]:
    """The kv heads that these query heads read."""
    group = _group(site)
    return sorted({head // group for head in kept})


@dataclass(frozen=True)
class KeptHeads:
    """What a call of attention must know of the heads that its module has left.

    Attributes:
        total: query heads before.
        kept: those left, sorted.
        kv_index: of each of them, the place of its kv head among those left; `None` where the kv heads serve equally
            many, so that nothing need be said.
    """

    total: int
    kept: tuple[int, ...]
    kv_index: tuple[int, ...] | None

    @classmethod
    def of(cls, site: AttentionSite, kept: Sequence[int]) -> "KeptHeads":
        """Those of an attention module, as it was before."""
        places = {head: place for place, head in enumerate(kept_kv_heads(site, kept))}
        index = tuple(places[head // _group(site)] for head in kept)
        return cls(site.query_heads or 0, tuple(kept), None if _is_even(site, kept) else index)

    @classmethod
    def without(cls, site: AttentionSite, pruned: Sequence[int]) -> "KeptHeads":
        """All but these; ValueError if they are not there, or all there are."""
        check_heads(site, pruned)
        return cls.of(site, [head for head in range(site.query_heads or 0) if head not in pruned])

    def renumbered(self, call: AttentionCall) -> AttentionCall:
        """A call with the queries of these heads, with all else that it brings per head brought to these."""
        kwargs = dict(call.kwargs)
        changes: dict[str, Any] = {}
        for name, dim in (("s_aux", 0), ("position_bias", 1)):
            tensor = kwargs.get(name)
            if tensor is not None and tensor.shape[dim] == self.total:
                kwargs[name] = tensor.index_select(dim, torch.tensor(self.kept, device=tensor.device))
        pairs = call.mask.pairs
        if pairs is not None and pairs.shape[1] == self.total != 1:
            changes["mask"] = call.mask.of_heads(self.kept)
        if self.kv_index is not None:
            index = torch.tensor(self.kv_index, device=call.key.device)
            changes |= {"key": call.key.index_select(1, index), "value": call.value.index_select(1, index)}
        return call.replace(kwargs=kwargs, **changes)


class HeadSurgery(SurgeryVariant):
    """Surgery that may take out heads: those that are left are its `heads`.

    Attributes:
        even_choice: how its settings choose equally many in all layers and groups, in words.
    """

    even_choice: ClassVar[str] = ""

    heads: KeptHeads

    @property
    def needs_groups(self) -> bool:
        return True

    @property
    def leaves_groups(self) -> bool:
        return not self.changes or self.heads.kv_index is None

    def check_plain(self) -> None:
        if not self.leaves_groups:
            raise NotImplementedError(
                f"some kv heads of {self.site.name} have more query heads left than others. {self.even_choice}"
            )

    @property
    def kv_heads_left(self) -> int:
        """How many kv heads there are then."""
        return len(kept_kv_heads(self.site, self.heads.kept))

    def hooks(self, model: nn.Module) -> list[Hook]:
        if not self.changes or self.kv_heads_left == self.site.kv_heads:
            return []
        return [Hook(model.get_submodule(self.site.name), "before", self.before_module)]

    def before_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """ValueError if the kv cache was filled by who does not know that kv heads were taken out."""
        cache = find_cache([*args, *kwargs.values()])
        held = None if cache is None else stored_heads(cache, self.site)
        left = self.kv_heads_left
        if held not in (None, left):
            raise ValueError(
                f"{self.site.name} has {left} kv heads left, but its kv cache holds {held}: it was filled before heads "
                "were taken out or merged, or by prefix tuning, which fills every layer alike. Start with a new cache, "
                "take another adapter, such as LoRA, or leave a query head of every kv head."
            )


@dataclass(eq=False)
class AlignmentHeads(Change):
    """The heads whose cross-attention `generate` reads word timestamps from (Whisper), by their new numbers.

    What they become is worked out when they are exchanged: the modules of other layers change the same list.

    Attributes:
        site: the cross-attention module, as it was before.
        kept: its query heads that are kept, sorted.
    """

    site: AttentionSite
    kept: tuple[int, ...]

    def exchange(self, model: nn.Module) -> None:
        settings: Any = model.get_submodule(self.module.rpartition(".")[0]).generation_config
        before = settings.alignment_heads
        settings.alignment_heads = self._renumbered(before) if self.value is None else self.value
        self.value = before

    def check_undo(self, model: nn.Module, variant: str) -> None:
        """The list was kept; nothing can be missing."""

    def _renumbered(self, heads: Sequence[Sequence[int]]) -> list[list[int]]:
        places = {head: place for place, head in enumerate(self.kept)}
        own = [layer == self.site.layer_index for layer, _ in heads]
        found = [
            [layer, places[head] if is_own else head]
            for (layer, head), is_own in zip(heads, own, strict=True)
            if not is_own or head in places
        ]
        if heads and not found:
            raise ValueError(
                f"Word timestamps are read from the heads {[list(pair) for pair in heads]} (layer, head) of the "
                f"cross-attention; taking out those of {self.site.name} would leave none. Keep one, or give up word "
                "timestamps first: del model.generation_config.alignment_heads"
            )
        return found


def _alignment(model: nn.Module, site: AttentionSite, kept: Sequence[int]) -> list[Change]:
    """The change of the heads that word timestamps are read from, where the module has any; it comes first: it may
    refuse, and nothing of the module is then exchanged."""
    names = site.name.split(".")
    for owner in (".".join(names[:depth]) for depth in range(len(names) if site.is_cross else 0)):
        settings = getattr(model.get_submodule(owner), "generation_config", None)
        heads = getattr(settings, "alignment_heads", None) or []
        if site.layer_index in [layer for layer, _ in heads]:
            path = f"{owner}.generation_config".lstrip(".")
            return [AlignmentHeads(path, "alignment_heads", None, site, tuple(kept))]
    return []


def _group(site: AttentionSite) -> int:
    return (site.query_heads or 1) // (site.kv_heads or 1)


def _is_even(site: AttentionSite, kept: Sequence[int]) -> bool:
    """Whether every kv head kept has equally many query heads."""
    sizes = [sum(head // _group(site) == kv for head in kept) for kv in kept_kv_heads(site, kept)]
    return len(set(sizes)) == 1


def kv_fields(module: Any) -> list[str]:
    """Names of the fields of a module's configuration that say how many kv heads there are, and nothing else."""
    config: Any = getattr(module, "config", None)
    if config is None:
        return []
    ours = {config.attribute_map.get(name, name) for name in _KV_HEADS}
    return [name for name in sorted(ours - set(query_fields(config))) if isinstance(vars(config).get(name), int)]


def query_fields(config: Any) -> list[str]:
    """Names of the fields of a configuration that say how many query heads there are."""
    names = {config.attribute_map.get(name, name) for name in _QUERY_HEADS}
    return [name for name in sorted(names) if isinstance(vars(config).get(name), int)]


def sizes_of_heads(module: Any, site: AttentionSite, kept: Sequence[int], kv_kept: Sequence[int]) -> dict[str, Any]:
    """What else in the module, and in its configuration, depends on the number of heads."""
    width, dim = (site.query_heads or 0) * (site.head_dim or 0), site.head_dim or 0
    used = attention_forward(type(module)).__code__.co_names
    values: dict[str, Any] = {}
    # A position bias is made once, for all heads, and handed from layer to layer: that count stays.
    if "position_bias" not in site.arguments:
        values |= {n: len(kept) for n in _QUERY_HEADS if vars(module).get(n) == site.query_heads}
    values |= {n: len(kv_kept) for n in _KV_HEADS if vars(module).get(n) == site.kv_heads}
    values |= {n: len(kept) * dim for n in _QUERY_WIDTHS if n in used and vars(module).get(n) == width}
    values |= {n: len(kv_kept) * dim for n in _KV_WIDTHS if n in used}
    if isinstance(vars(module).get("num_key_value_groups"), int):  # how often attention repeats keys and values
        values["num_key_value_groups"] = len(kept) // len(kv_kept) if _is_even(site, kept) else 1
    if getattr(module, "config", None) is None:
        raise unrecognised(site, "it has no configuration")
    values["config"] = config = own_config(module.config)
    for names, count in ((_QUERY_HEADS, len(kept)), (_KV_HEADS, len(kv_kept))):
        for name in (config.attribute_map.get(name, name) for name in names):
            if isinstance(vars(config).get(name), int):
                vars(config)[name] = count
    return values
