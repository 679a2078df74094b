"""Which heads and channels of a model to take out: all that belongs together is a unit, ranked by score and size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ....core.host import find_sites
from ....core.linear import LinearView
from ....core.sites import AttentionSite
from ....inspection.channels import Metric, fluctuation, projection_weight, standardised
from ....surgery.channels import mlp_projections
from ....surgery.projections import head_projections, output_projection
from .statistics import FlapStatistics

Score = Metric | Literal["amp"]
Structure = Literal["al-am", "ul-um", "amp"]


@dataclass(frozen=True, eq=False)
class Units:
    """What can be taken out of one module: its kv heads, each with its query heads, or the channels of its MLP.

    Attributes:
        site: name of the attention module, or of the self-attention of the MLP's layer.
        are_channels: of the MLP.
        scores: `(U,)` float64; the higher, the more it is worth to keep.
        weight: weights, without biases, that one unit takes with it.
        heads: query heads of a unit; 1 for channels.
    """

    site: str
    are_channels: bool
    scores: torch.Tensor
    weight: int
    heads: int = 1


def score_units(
    model: nn.Module, sites: Sequence[AttentionSite], known: FlapStatistics, metric: Score, mlp: bool
) -> list[Units]:
    """Score every unit of some attention modules, and of the MLPs in their layers.

    Scores of channels are standardised within their module; a unit of heads has the mean over its channels. Under `amp`
    a unit of heads has the mean of its heads' norms, a channel its mean absolute value.

    Raises:
        ValueError: the statistics are of another model, or not of all these modules.
        NotImplementedError: projections are not recognised, or query heads are spread unevenly over kv heads.
    """
    known.check(model)
    found = [_score_heads(model, site, known, metric) for site in sites]
    if mlp:
        found += [_score_channels(model, site, known, metric) for site in sites if not site.is_cross]
    return found


def lowest_units(modules: Sequence[Units], sparsity: float, structure: Structure) -> list[list[int]]:
    """The units to take out of each module, sorted; every module keeps its best one.

    Args:
        modules: of `score_units`.
        sparsity: share of all their weights (`al-am`: the lowest units of all modules together, as many as come closest
            to it), or of the units of each module (`ul-um`, rounded down; `amp`, rounded half to even, with the
            channels of a layer to make up for the rounding of its heads).

    Raises:
        ValueError: there are not that many to take.
    """
    if structure == "ul-um":
        # a share such as 0.29 of 100 is a little less than 29 in binary
        counts = [min(math.floor(sparsity * len(m.scores) + 1e-9), len(m.scores) - 1) for m in modules]
        return _lowest_of_each(modules, counts)
    if structure == "amp":
        rounded = [(m, min(round(sparsity * len(m.scores)), len(m.scores) - 1)) for m in modules]
        missing = {m.site: sparsity * len(m.scores) - n for m, n in rounded if not m.are_channels}
        counts = [
            min(max(round(sparsity * len(m.scores) + missing[m.site]), 0), len(m.scores) - 1) if m.are_channels else n
            for m, n in rounded
        ]
        return _lowest_of_each(modules, counts)
    owners = torch.cat([torch.full_like(m.scores, i, dtype=torch.long) for i, m in enumerate(modules)])
    numbers = torch.cat([torch.arange(len(m.scores)) for m in modules])
    weights = torch.tensor([m.weight for m in modules], dtype=torch.float64)[owners]
    best = torch.stack([m.scores.argmax() for m in modules])
    scores = torch.cat([m.scores for m in modules]).masked_fill(numbers == best[owners], math.inf)
    order = scores.argsort(stable=True)[: len(scores) - len(modules)]
    taken = torch.cat([torch.zeros(1, dtype=torch.float64), weights[order].cumsum(0)])
    wanted, total = sparsity * weights.sum(), weights.sum()
    if wanted > taken[-1]:
        raise ValueError(
            f"sparsity={sparsity} is more than there is to take: every module keeps its best head, or group of heads, "
            f"and its best channel, which leaves {float(taken[-1] / total):.3f} of the weights."
        )
    chosen = order[: int((taken - wanted).abs().argmin())]
    return [sorted(numbers[chosen[owners[chosen] == i]].tolist()) for i in range(len(modules))]


def share_of_modules(model: nn.Module, modules: Sequence[Units], sparsity: float) -> float:
    """The share of some modules' parameters, biases included, that is the share `sparsity` of all the model has.

    Raises:
        ValueError: they do not have that many.
    """
    sites = {site.name: site for site in find_sites(model)}
    paths: set[str] = set()
    for units in modules:
        if units.are_channels:
            makers, reader = mlp_projections(model, sites[units.site])
            paths |= {*makers, reader}
        else:
            paths |= {part.projection for part in head_projections(model, sites[units.site])}
    held = sum(p.numel() for path in paths for p in model.get_submodule(path).parameters())
    total = sum(p.numel() for p in model.parameters())
    if sparsity * total >= held:
        raise ValueError(
            f"sparsity={sparsity} of the {total} parameters of the model is all that the chosen attention modules and "
            f"MLPs hold, {held}, or more: choose less than {held / total:.3f}, or more modules."
        )
    return sparsity * total / held


def _lowest_of_each(modules: Sequence[Units], counts: Sequence[int]) -> list[list[int]]:
    return [sorted(m.scores.argsort(stable=True)[:n].tolist()) for m, n in zip(modules, counts, strict=True)]


def _score_heads(model: nn.Module, site: AttentionSite, known: FlapStatistics, metric: Score) -> Units:
    parts = head_projections(model, site)
    heads, kv_heads = site.query_heads or 0, site.kv_heads or 0
    group = heads // kv_heads
    if group * kv_heads != heads:
        raise NotImplementedError(
            f"{site.name} has {heads} query heads on {kv_heads} kv heads: which belong together is not known."
        )
    weight = 0
    for part in parts:
        view = LinearView.at(model, part.projection)
        per_channel = view.in_features if part.side == "rows" else view.out_features
        weight += part.index.shape[1] * per_channel * (group if part.of == "query" else 1)
    output = output_projection(model, site)
    channels = known.of(model, output)
    if metric == "amp":
        if site.name not in known.head_norms:
            raise ValueError(
                f"metric='amp' needs the norms of heads, which these statistics do not have of {site.name}: make them "
                "with `patchattn calibrate flap --amp`, or flap_statistics(..., amp=True)."
            )
        scores = known.head_norms[site.name]
    else:
        each = standardised(fluctuation(channels, projection_weight(model, output), metric))
        (columns,) = [part.index for part in parts if part.side == "columns"]
        scores = each[columns].mean(-1)
    return Units(site.name, False, scores.view(kv_heads, group).mean(-1), weight, group)


def _score_channels(model: nn.Module, site: AttentionSite, known: FlapStatistics, metric: Score) -> Units:
    makers, reader = mlp_projections(model, site)
    channels = known.of(model, reader)
    weight = projection_weight(model, reader)
    scores = channels.mean_abs if metric == "amp" else standardised(fluctuation(channels, weight, metric))
    return Units(site.name, True, scores, (len(makers) + 1) * len(weight))
