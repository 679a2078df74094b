"""Merging kv heads: groups of them become one, whose weights, and those of the queries, come from all of the group."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..core.host import find_sites
from ..core.linear import LinearView
from ..core.packing import CHILD
from ..core.patching import active_chains
from ..core.selection import base_model
from ..core.sites import AttentionSite
from ..hosts.transformers.bases import original_config
from .change import Change
from .heads import HeadSurgery, KeptHeads, kv_fields, sizes_of_heads
from .projections import Heads, head_projections, kept_index, unrecognised

_RIDGE = 1e-6  # of the mean eigenvalue: what the data never did counts a little, so that maps are right there too


@dataclass(frozen=True, eq=False)
class Moments:
    """What is known of the inputs of one attention module, and of how it turns its keys by their position.

    Attributes:
        inputs: `(E + 1, E + 1)` float64 mean product of two channels of the input, of which a 1 is the last.
        pairs: `(P, 2)` which channels of a head rotary embedding turns together; the others are left alone.
        fault: why pairs are not known.
    """

    inputs: torch.Tensor
    pairs: torch.Tensor
    fault: str | None = None


@dataclass(frozen=True, eq=False)
class KvMoments:
    """Those of every attention module, by name: what `patchattn.inspection.kv_moments` returns."""

    sites: Mapping[str, Moments] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Group:
    """What heads that are to be merged do. m of them, of D channels each, in each of G groups; float64.

    Attributes:
        keys, values: `(G, m, D, m, D)` mean products of their channels, before rotary embedding.
        queries: `(G, m, D)` mean square of the queries that read each head.
        readers: `(G, m, D, D)` product of what the output projection makes of two channels of a head's value.
        moments: of the module.
    """

    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    readers: torch.Tensor
    moments: Moments


@dataclass(frozen=True, eq=False)
class Maps:
    """How the heads of a group become one and are read from it.

    Attributes:
        encode: `(G, m, D, D)`: the merged head is the sum of `encode @ head` over the group.
        decode: `(G, m, D, D)`: in place of a head comes `decode @ merged`.
    """

    encode: torch.Tensor
    decode: torch.Tensor


class KvMerge(HeadSurgery):
    """Surgery after which fewer kv heads are left. A subclass gives `merge`, and what its settings come to.

    Keys are merged before rotary embedding: maps of keys must then turn with their positions.

    Args:
        kv_heads: how many are to be left; 0 leaves the module as it is.
        moments: known when the model is patched; a patch that is loaded gets its weights from its file.
    """

    def __init__(self, config: Any, site: AttentionSite, kv_heads: int, moments: KvMoments | None) -> None:
        super().__init__(config, site)
        self.kv_heads, self.moments = kv_heads, moments
        self.heads = KeptHeads.without(site, ())
        self.weights: list[str] = []

    def merge(self, group: Group) -> tuple[Maps, Maps]:
        """The maps of keys and of values.

        Raises:
            NotImplementedError: keys cannot be merged in that way.
        """
        raise NotImplementedError(f"{type(self).__name__} must define merge(group).")

    def keep_shares(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """What each head of a group gives to the merged one, weights and bias `(G, m, D, E + 1)`: they sum to it."""

    @property
    def is_identity(self) -> bool:
        return not self.kv_heads or self.kv_heads == self.site.kv_heads

    @property
    def kv_heads_left(self) -> int:
        return self.kv_heads or super().kv_heads_left

    def plan(self, model: nn.Module) -> list[Change]:
        if self.is_identity:
            return []
        parts = merged_projections(model, self.site)
        merged = [None] * len(parts) if self.moments is None else self._merged(model, parts)
        kept = list(range(self.kv_heads))
        changes: list[Change] = []
        for path in dict.fromkeys(part.projection for part in parts):
            own = [(part, new) for part, new in zip(parts, merged, strict=True) if part.projection == path]
            index = kept_index([part for part, _ in own], range(self.site.query_heads or 0), kept)
            for name, value in LinearView.at(model, path).cut(own[0][0].side, index).items():
                if isinstance(value, nn.Parameter):
                    _fill(value, name, own, index)
                    self.weights.append(f"{path}.{name}")
                changes.append(Change(path, name, value))
        sizes = sizes_of_heads(model.get_submodule(self.site.name), self.site, self.heads.kept, kept)
        self.moments = None
        return [*changes, *(Change(self.site.name, name, value) for name, value in sizes.items())]

    def rename(self, site: AttentionSite, config: Any, renaming: Any) -> None:
        super().rename(site, config, renaming)
        self.weights = [renaming(name) for name in self.weights]

    def carried(self) -> list[str]:
        return self.weights

    @torch.no_grad()
    def _merged(self, model: nn.Module, parts: list[Heads]) -> list[torch.Tensor | None]:
        """Of queries, keys and values `(H or Hkv', D, E + 1)`, weights and bias; of the output `(H, D, E)`."""
        if self.moments is None or self.site.name not in self.moments.sites:
            raise ValueError(f"Nothing is known of the inputs of {self.site.name}: make moments of this model.")
        moments = self.moments.sites[self.site.name]
        query, key, value, output = (_numbers(model, part) for part in parts)
        if len(moments.inputs) != query.shape[-1]:
            raise ValueError(
                f"These moments are of inputs {len(moments.inputs) - 1} wide, those of {self.site.name} are "
                f"{query.shape[-1] - 1}: make them on this model."
            )
        heads, dim = query.shape[:2]
        groups, size = self.kv_heads, (self.site.kv_heads or 1) // self.kv_heads
        inputs = moments.inputs.to(query)
        inputs = inputs + _RIDGE * inputs.diagonal().mean() * torch.eye(len(inputs)).to(inputs)
        key, value = (each.view(groups, size, dim, -1) for each in (key, value))
        query, output = (each.view(groups, size, -1, *each.shape[1:]) for each in (query, output))
        of_keys, of_values = (torch.einsum("gmdx,xy,gney->gmdne", each, inputs, each) for each in (key, value))
        energy = ((query @ inputs) * query).sum(-1).mean(2)
        readers = torch.einsum("gmrdx,gmrex->gmde", output, output)
        of_key, of_value = self.merge(Group(of_keys, of_values, energy, readers, moments))
        shares = [
            torch.einsum("gmed,gmdx->gmex", maps.encode, each) for maps, each in ((of_key, key), (of_value, value))
        ]
        self.keep_shares(*shares)
        return [
            torch.einsum("gmde,gmrdx->gmrex", of_key.decode, query).reshape(heads, dim, -1),
            *(share.sum(1) for share in shares),
            torch.einsum("gmde,gmrdx->gmrex", of_value.decode, output).reshape(heads, dim, -1),
        ]


def merged_projections(model: nn.Module, site: AttentionSite) -> list[Heads]:
    """Those that make queries, keys and values, and the one that reads the heads.

    Raises:
        NotImplementedError: they are not recognised, or the model knows no number of kv heads.
    """
    parts = head_projections(model, site)
    module: Any = model.get_submodule(site.name)
    if not kv_fields(module):
        raise unrecognised(site, "its configuration knows no number of kv heads but that of its queries")
    if site.shares_keys:
        raise unrecognised(site, "other layers of its class read keys that it makes")
    if any(LinearView.at(model, part.projection).stores_inputs_first for part in parts):
        raise unrecognised(site, "its projections store inputs first")
    return parts


def _numbers(model: nn.Module, part: Heads) -> torch.Tensor:
    """`(heads, D, E + 1)` weights and biases that make heads, or `(heads, D, E)` weights that read them; float64."""
    layer = LinearView.at(model, part.projection)
    weight = layer.weight.double()
    index = part.index.to(weight.device)
    if part.side == "columns":
        return weight.mT[index]
    return torch.cat([weight, layer.bias.double()[:, None]], dim=1)[index]


@torch.no_grad()
def _fill(
    parameter: nn.Parameter, name: str, parts: list[tuple[Heads, torch.Tensor | None]], index: torch.Tensor
) -> None:
    """Write merged heads to what is left of a projection, whose rows or columns were `index`; NaN where a file says."""
    place = {number: row for row, number in enumerate(index.tolist())}
    for part, new in parts:
        if new is None or parameter.is_meta:
            parameter.fill_(torch.nan)
            continue
        rows = torch.tensor([place[n] for n in part.index[: len(new)].flatten().tolist()], device=parameter.device)
        if name == "bias":
            parameter[rows] = new[..., -1].flatten().to(parameter)
        elif part.side == "columns":
            parameter[:, rows] = new.flatten(0, 1).mT.to(parameter)
        else:
            parameter[rows] = new[..., :-1].flatten(0, 1).to(parameter)


def fold(model: nn.Module) -> Any:
    """A model of the same class with the merged weights, without a patch, whose configuration says its kv heads.

    Its `save_pretrained` writes what any library of models reads. The patched one stays as it is.

    Args:
        model: patched with a variant that merges kv heads, and with nothing else.

    Raises:
        ValueError: nothing is merged, something else is patched in, or layers of one configuration differ in kv heads.
    """
    base: Any = base_model(model)
    variants = [variant for chain in active_chains(base).values() for variant in chain.variants().values()]
    if not variants or not all(isinstance(variant, KvMerge) for variant in variants):
        names = sorted({type(variant).__name__ for variant in variants})
        raise ValueError(f"Only merged kv heads can be folded; {type(base).__name__} carries {names or 'no patch'}.")
    copies: dict[int, Any] = {}
    config = copy.deepcopy(base.config, copies)
    counts: dict[int, set[int | None]] = {}
    for site in find_sites(base):
        module = base.get_submodule(site.name)
        own = id(original_config(module))
        counts.setdefault(own, set()).add(site.kv_heads)
        for name in kv_fields(module):
            setattr(copies[own], name, site.kv_heads)
    if uneven := [found for found in counts.values() if len(found) > 1]:
        raise ValueError(
            f"Layers of one configuration have {sorted(map(str, uneven[0]))} kv heads, and it can name one number: "
            "merge those of all layers."
        )
    made = type(base)(config)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items() if f".{CHILD}." not in name}
    made.load_state_dict(weights, assign=True)
    made.tie_weights()
    for variant in variants:
        variant.fold(made)
    return made.train(base.training)
