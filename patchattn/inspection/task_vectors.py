"""Task vectors and function vectors out of demonstrations. arXiv 2310.15916 and 2310.15213."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..core.call import AttentionCall
from ..core.head_vectors import HeadVectors
from ..core.heads import BaseFacts, HeadList
from ..core.importance import HeadImportance, SiteScores
from ..core.layer_outputs import enclosing_block, hidden_of
from ..core.layer_vectors import LayerVectors
from ..core.probing import recording
from ..core.selection import base_model, select_sites
from ..core.sites import AttentionSite
from ..core.token_numbers import last_rows
from ..surgery.projections import output_projection
from .channels import on_device


@torch.no_grad()
def layer_means(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    layers: int | Iterable[int] | None = None,
    modules: str | Iterable[str] | None = None,
) -> LayerVectors:
    """Mean of the residual stream behind every layer at the last token of each sequence: task vectors.

    `patch_model(model, "task_vectors", vectors=layer_means(model, batches).at(layer).to_dict())` puts the one of a
    layer in the place of another prompt's.

    Args:
        model: a transformers model in evaluation mode, patched or not.
        batches: keyword arguments of its forward, with padding on either side: demonstrations, each ending where an
            answer is asked for.
        layers: which layers, as in `patch_model`.
        modules: which attention modules, by which layers are found, as in `patch_model`; those of one tower.

    Raises:
        ValueError: no data, a model in training mode, or several towers.
        NotImplementedError: what a layer hands on is no row for each token that its attention sees.
    """
    base, sites = _checked(model, layers, modules)
    sums: dict[int, torch.Tensor] = {}
    counts: dict[int, int] = {}
    rows: dict[int, torch.Tensor] = {}

    def see(call: AttentionCall, output: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        rows[call.site.layer_index] = last_rows(call.mask)
        return output

    def after(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden, last = hidden_of(output), rows.pop(layer, None)
            if last is None or last.shape[1] != hidden.shape[1]:
                raise NotImplementedError(f"{type(module).__name__} hands on other tokens than its attention sees.")
            found = hidden[last.expand(hidden.shape[:2]).to(hidden.device)].cpu().double()
            sums[layer] = sums.get(layer, 0.0) + found.sum(0)
            counts[layer] = counts.get(layer, 0) + len(found)

        return hook

    blocks = {site.layer_index: base.get_submodule(enclosing_block(base, site.name)) for site in sites}
    handles = [block.register_forward_hook(after(layer)) for layer, block in blocks.items()]
    try:
        with recording(base, sites, see):
            for batch in batches:
                base(**on_device(base, batch))
    finally:
        for handle in handles:
            handle.remove()
    if missing := [site.name for site in sites if not counts.get(site.layer_index)]:
        raise ValueError(f"The data does not reach {missing[0]}: give batches, or leave it out with modules=...")
    vectors = {layer: tuple((sums[layer] / counts[layer]).tolist()) for layer in sorted(sums)}
    return LayerVectors(vectors, BaseFacts.of(base, sites[0]))


@torch.no_grad()
def indirect_effects(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    answers: Iterable[Sequence[int]],
    means: HeadVectors,
    *,
    modules: str | Iterable[str] | None = None,
) -> HeadImportance:
    """How much likelier the right answer becomes when a head gives its mean over demonstrations at the last token.

    The causal indirect effect of function vectors, signed, a forward for every head of `means`.

    Args:
        model: a causal language model in evaluation mode.
        batches: prompts whose demonstrations are of no use, such as with shuffled answers; padding on either side.
        answers: for every batch the id of the right answer's first token, of each sequence.
        means: of `head_means(model, demonstrations, rows="last")`.
        modules: which attention modules, as in `patch_model`; those of one tower.

    Returns:
        The mean effect of every head; 0 of those without a mean.

    Raises:
        ValueError: no data, a model in training mode, several towers, answers that are not one a sequence, or means of
            another model.
    """
    base, sites = _checked(model, None, modules)
    for site in sites:
        means.heads.of_site(site)
        if means.base is not None:
            means.base.check(base, site, "list of means")
    effects = {site.name: [0.0] * site.require("query_heads", by="indirect_effects") for site in sites}
    now: list[tuple[int, int]] = []
    count = tokens = 0

    def see(call: AttentionCall, output: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        if not now or now[0][0] != call.site.layer_index:
            return output
        layer, head = now[0]
        mean = torch.tensor(means.vectors[layer][head], dtype=torch.float64).to(output)
        new = output.clone()
        new[:, :, head] = torch.where(last_rows(call.mask)[..., None], mean, output[:, :, head])
        return new

    with recording(base, sites, see):
        for batch, right in zip(batches, answers, strict=True):
            given = on_device(base, batch)
            ids = torch.tensor(list(right), device=given["input_ids"].device)
            if ids.shape != (len(given["input_ids"]),):
                raise ValueError(f"There are {len(ids)} answers for {len(given['input_ids'])} sequences.")
            before = _likelihood(base, given, ids)
            for site in sites:
                for head in means.vectors.get(site.layer_index, {}):
                    now[:] = [(site.layer_index, head)]
                    effects[site.name][head] += float((_likelihood(base, given, ids) - before).sum())
            now.clear()
            count, tokens = count + len(ids), tokens + given["input_ids"].numel()
    if not count:
        raise ValueError("There are no prompts to measure effects on.")
    scores = {
        site.name: SiteScores(
            site.layer_index,
            site.require("kv_heads", by="indirect_effects"),
            tuple(effect / count for effect in effects[site.name]),
        )
        for site in sites
    }
    return HeadImportance(scores, "indirect_effect", BaseFacts.of(base, sites[0]), {}, tokens)


@torch.no_grad()
def function_vector(
    model: nn.Module,
    means: HeadVectors,
    heads: Any,
    *,
    layer: int,
    modules: str | Iterable[str] | None = None,
) -> LayerVectors:
    """The sum of what chosen heads, each giving its mean, write to the residual stream: without the projection's bias.

    Args:
        model: a transformers model.
        means: of `head_means(model, demonstrations, rows="last")`.
        heads: as `HeadList.parse` takes them, such as those of the largest `indirect_effects`.
        layer: behind which it is to be added.
        modules: which attention modules, as in `patch_model`; those of one tower.

    Raises:
        ValueError: several towers, no such layer, or a head without a mean.
        NotImplementedError: a layer's output projection is not recognised.
    """
    base, sites = _checked(model, None, modules, trains=True)
    listed = HeadList.parse(heads)
    if layer not in {site.layer_index for site in sites}:
        raise ValueError(f"There is no layer {layer} that attends.")
    total: torch.Tensor | float = 0.0
    for site in sites:
        chosen = listed.of_site(site)
        if not chosen:
            continue
        known = means.vectors.get(site.layer_index, {})
        if lacking := [head for head in chosen if head not in known]:
            raise ValueError(f"There is no mean of head {lacking[0]} of layer {site.layer_index} ({site.name}).")
        projection: Any = base.get_submodule(output_projection(base, site))
        weight = next(projection.parameters())
        size = len(known[chosen[0]])
        given = torch.zeros(2, site.require("query_heads", by="function_vector"), size, dtype=torch.float64)
        for head in chosen:
            given[0, head] = torch.tensor(known[head], dtype=torch.float64)
        made = projection(given.flatten(1).to(weight)[:, None]).cpu().double()
        total = total + made[0, 0] - made[1, 0]  # of zeros, its bias
    if not isinstance(total, torch.Tensor):
        raise ValueError(f"The heads are of the layers {sorted(listed.heads)}, none of which attends.")
    return LayerVectors({layer: tuple(total.tolist())}, BaseFacts.of(base, sites[0]))


@torch.no_grad()
def first_token_accuracy(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], answers: Iterable[Sequence[int]]
) -> float:
    """Share of prompts after which the likeliest token is the right answer's first: by which a layer is chosen.

    Args:
        model: a causal language model in evaluation mode, patched or not.
        batches: prompts, with padding on either side.
        answers: for every batch the id of the right answer's first token, of each sequence.

    Raises:
        ValueError: no data, or answers that are not one a sequence.
    """
    base = base_model(model)
    right = count = 0
    for batch, ids in zip(batches, answers, strict=True):
        found = last_logits(base, on_device(base, batch)).argmax(-1).cpu()
        if len(found) != len(ids):
            raise ValueError(f"There are {len(ids)} answers for {len(found)} sequences.")
        right, count = right + int((found == torch.tensor(list(ids))).sum()), count + len(found)
    if not count:
        raise ValueError("There are no prompts to measure accuracy on.")
    return right / count


def _checked(model: nn.Module, layers: Any, modules: Any, *, trains: bool = False) -> tuple[Any, list[AttentionSite]]:
    """The model, and self-attention of one tower."""
    base = base_model(model)
    if base.training and not trains:
        raise ValueError("This needs a model in evaluation mode: model.eval().")
    sites = [site for site in select_sites(base, layers=layers, modules=modules) if not site.is_cross]
    if len({site.tower for site in sites}) != 1 or len({site.layer_index for site in sites}) < len(sites):
        raise ValueError(f"{type(base).__name__} has several towers, or attention modules in a layer: use modules=...")
    return base, sites


def last_logits(base: Any, given: Mapping[str, Any]) -> torch.Tensor:
    """`(B, V)` of what follows the last token of each sequence."""
    logits, mask = base(**given).logits, given.get("attention_mask")
    if mask is None:
        return logits[:, -1]
    places = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask.bool(), places, -1).amax(-1).to(logits.device)
    return logits[torch.arange(len(logits), device=logits.device), last]


def _likelihood(base: Any, given: Mapping[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """`(B,)` probability of an id after each sequence."""
    logits = last_logits(base, given)
    shares = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    return shares.gather(1, ids[:, None].to(shares.device))[:, 0].double()
