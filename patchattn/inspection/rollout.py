"""What of each token reaches each output through all layers: attention rollout and flow. arXiv 2005.00928.

And how spread out the attention of each head is.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.call import AttentionCall
from ..core.hooks import enclosing_layer
from ..core.selection import base_model, select_sites
from ..core.sites import AttentionSite
from .attention_maps import head_weights, look, of_row

_MOST_TOKENS = 64  # of flow, which takes a maximum flow for each pair of tokens


@dataclass(frozen=True, eq=False)
class Rollout:
    """Attention through layers, in one sequence, padding left out.

    Attributes:
        sites: the attention modules, first layer first.
        weights: `(L, n, n)` float64: how much of input token j (column) there is in token i (row) behind layer l.
        tokens: index in the input of each of the n tokens.
    """

    sites: tuple[AttentionSite, ...]
    weights: torch.Tensor
    tokens: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class AttentionEntropy:
    """How spread out the attention of an attention module's heads is, mean over the real rows of some data.

    Attributes:
        site: the attention module.
        entropy: `(H,)` float64: -sum of a ln a, in nats. Where heads have sinks of their own (`s_aux`), a row's weights
            sum to less than 1, and are taken as they are.
        share: `(H,)` float64: of each row, over ln of the number of keys that it sees, and 0 where it sees one.
        mass: `(H,)` float64: sum of a row's weights.
        rows: how many rows.
    """

    site: AttentionSite
    entropy: torch.Tensor
    share: torch.Tensor
    mass: torch.Tensor
    rows: int


def attention_rollout(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    modules: str | Iterable[str] | None = None,
    row: int = 0,
    residual: bool = True,
) -> Rollout:
    """Attention multiplied through the layers: `R_l = A_l R_(l-1)`, A the mean over heads.

    Args:
        model: a transformers model, patched or not.
        inputs: keyword arguments of one forward.
        modules: which attention modules, as in `patch_model`: one tower, and not its cross attention.
        row: which sequence of the batch.
        residual: add the identity to A before its rows are made to sum to 1, for what goes past attention.

    Raises:
        ValueError: several attention modules in a layer or several towers; or as `attention_received`.
        NotImplementedError: a layer of the tower does not attend, so that nothing is known of what passes it; or as
            `attention_received`.
    """
    sites, mixings, tokens = _mixings(model, inputs, modules, row, residual)
    product = torch.eye(len(tokens), dtype=torch.float64)
    found = []
    for mixing in mixings:
        product = mixing @ product
        found.append(product)
    return Rollout(sites, torch.stack(found), tokens)


def attention_flow(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    modules: str | Iterable[str] | None = None,
    row: int = 0,
) -> Rollout:
    """The most that can flow from each token behind a layer to each input token, if weights were the widths of pipes.

    The graph has a node per layer and token, and edges as wide as attention with its residual, as in
    `attention_rollout`; rows are made to sum to 1. One maximum flow for each layer and pair of tokens.

    Args:
        model: as in `attention_rollout`.
        inputs: likewise; at most 64 tokens.
        modules: likewise.
        row: likewise.

    Raises:
        ValueError: too many tokens; or as `attention_rollout`.
        NotImplementedError: as `attention_rollout`.
    """
    import networkx  # type: ignore[import-untyped]  # which torch depends on

    sites, mixings, tokens = _mixings(model, inputs, modules, row, True)
    count = len(tokens)
    if count > _MOST_TOKENS:
        raise ValueError(f"Attention flow takes at most {_MOST_TOKENS} tokens, got {count}: it is a flow per pair.")
    graph, found = networkx.DiGraph(), []
    graph.add_nodes_from((0, token) for token in range(count))
    for layer, mixing in enumerate(mixings, 1):
        for upper, lower in mixing.nonzero().tolist():
            graph.add_edge((layer, upper), (layer - 1, lower), capacity=float(mixing[upper, lower]))
        flows = [
            [networkx.maximum_flow_value(graph, (layer, upper), (0, lower)) for lower in range(count)]
            for upper in range(count)
        ]
        table = torch.tensor(flows, dtype=torch.float64)
        found.append(table / table.sum(-1, keepdim=True))
    return Rollout(sites, torch.stack(found), tokens)


def attention_entropy(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    layers: int | Iterable[int] | None = None,
    modules: str | Iterable[str] | None = None,
) -> list[AttentionEntropy]:
    """Entropy of the attention of every head: low where a head looks at few tokens.

    Args:
        model: as in `attention_rollout`.
        batches: keyword arguments of its forward.
        layers: which layers, as in `patch_model`.
        modules: which attention modules, as in `patch_model`.

    Returns:
        One entry per attention module, in the order of the model.

    Raises:
        ValueError: no data; or as `attention_received`.
        NotImplementedError: as `attention_received`.
    """
    sites = select_sites(base_model(model), layers=layers, modules=modules)
    sums: dict[str, list[torch.Tensor]] = {}
    rows: dict[str, int] = {}

    def see(call: AttentionCall, own: torch.Tensor | None) -> None:
        name = call.site.name
        for sequence in range(call.query.shape[0]):
            visible, real = of_row(call, sequence)
            limits = visible[real].sum(-1).cpu().double().log()
            found = []
            for head in range(call.query.shape[1]):
                weights = head_weights(call, own, head, sequence, visible)[real].cpu().double()
                entropy = -torch.special.xlogy(weights, weights).sum(-1)
                share = torch.where(limits > 0, entropy / limits.clamp(min=math.log(2)), 0.0)
                found.append(torch.stack([entropy.sum(), share.sum(), weights.sum()]))
            sums.setdefault(name, []).append(torch.stack(found))
            rows[name] = rows.get(name, 0) + len(real)

    for batch in batches:
        look(model, batch, sites, see)
    if not sums:
        raise ValueError("There is no data: give at least one batch.")
    result = []
    for site in sites:
        entropy, share, mass = (torch.stack(sums[site.name]).sum(0) / rows[site.name]).unbind(-1)
        result.append(AttentionEntropy(site, entropy, share, mass, rows[site.name]))
    return result


def _mixings(
    model: nn.Module, inputs: Mapping[str, Any], modules: str | Iterable[str] | None, row: int, residual: bool
) -> tuple[tuple[AttentionSite, ...], list[torch.Tensor], tuple[int, ...]]:
    """The attention modules of a tower; of each `(n, n)` what mixes its tokens; and which tokens."""
    base = base_model(model)
    sites = select_sites(base, modules=modules)
    _check_tower(base, sites)
    mixings: list[torch.Tensor] = []
    places: list[tuple[int, ...]] = []

    def see(call: AttentionCall, own: torch.Tensor | None) -> None:
        visible, rows = of_row(call, row)
        if call.query.shape[2] != call.key.shape[2]:
            raise ValueError(
                f"{call.site.name} has {call.key.shape[2]} keys for {call.query.shape[2]} queries: rollout needs one "
                "forward over all of a text, without a kv cache from before."
            )
        heads = range(call.query.shape[1])
        total = sum(head_weights(call, own, head, row, visible)[rows][:, rows].cpu().double() for head in heads)
        mean = torch.as_tensor(total) / len(heads)
        mixing = mean + torch.eye(len(mean), dtype=torch.float64) if residual else mean
        mixings.append(mixing / mixing.sum(-1, keepdim=True))
        places.append(tuple(rows.tolist()))

    look(base, inputs, sites, see)
    if len(set(places)) > 1:
        raise ValueError("Layers have different tokens, so that their attention cannot be multiplied.")
    return tuple(sites), mixings, places[0]


def _check_tower(model: nn.Module, sites: list[AttentionSite]) -> None:
    """Refuse what is not all layers of one stack, each with one self-attention."""
    several = len({site.tower for site in sites}) > 1 or len({site.layer_index for site in sites}) < len(sites)
    if several or any(site.is_cross for site in sites):
        raise ValueError(
            f"{type(model).__name__} has several attention modules in a layer, or several towers: choose the "
            "self-attention of one with modules=..."
        )
    stack: Any = model.get_submodule(enclosing_layer(sites[0].name).rpartition(".")[0])
    count = len(stack) if isinstance(stack, nn.ModuleList) else sites[0].layer_count
    if lacking := sorted(set(range(count)) - {site.layer_index for site in sites}):
        raise NotImplementedError(
            f"Layer {lacking[0]} of {type(model).__name__} does not attend, or was left out: what passes through it "
            "is not known to rollout."
        )
