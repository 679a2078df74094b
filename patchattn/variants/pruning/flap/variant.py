"""FLAP: heads and MLP channels that fluctuate least are taken out, their mean stays as a bias. arXiv 2312.11983."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ....core.call import AttentionCall
from ....core.heads import Heads
from ....core.linear import LinearView
from ....core.registry import register_variant
from ....core.renaming import Renaming
from ....core.settings import option
from ....core.sites import AttentionSite
from ....core.variant import Attend, AttentionOutput, VariantConfig, VariantInfo
from ....files.documents import concerning
from ....inspection.channels import as_double
from ....surgery.change import Change
from ....surgery.channels import (
    channel_count,
    channel_mask,
    cut_channels,
    masked_channels,
    masks_by_module,
    mlp_projections,
    parse_masks,
)
from ....surgery.heads import HeadSurgery, KeptHeads, cut_heads, heads_at, heads_by_module, parse_heads
from ....surgery.projections import head_projections
from .statistics import FlapStatistics
from .structures import lowest_units, score_units, share_of_modules


@dataclass(frozen=True, kw_only=True)
class FlapConfig(VariantConfig):
    """Settings of FLAP; every field is described by `patchattn info flap`."""

    by_module = ("heads", "kept_channels")

    statistics: str | Path | FlapStatistics | None = option(
        None,
        help="A file that `patchattn calibrate flap` wrote, or what flap_statistics returned. A saved patch "
        "holds what came of them instead.",
    )
    sparsity: float | None = option(
        None,
        help="Share of the weights of the chosen attention modules, and of the MLPs in their layers, to take out; with "
        "structure=amp, share of all parameters of the model.",
        unit="ratio",
        minimum=0.0,
        maximum=1.0,
    )
    metric: Literal["wifv", "ifv", "wifn", "amp"] = option(
        "wifv",
        help="With sparsity: score of a channel: variance times squared norm of its weights (wifv), variance alone "
        "(ifv), norm times weights (wifn), or AMP's norms of what a head or channel gives (amp).",
        source="paper and released code",
    )
    structure: Literal["al-am", "ul-um", "amp"] = option(
        "al-am",
        help="With sparsity: rank heads and channels of all layers together (al-am), take the same share of every "
        "module, rounded down (ul-um), or the same share rounded as AMP does (amp).",
        source="released code",
    )
    mlp: bool = option(True, help="With sparsity: take out channels of MLPs, too; false: heads alone.")
    compensate: bool = option(
        True,
        help="Add to the biases what the means of the channels taken out gave, so that the output keeps its mean.",
        source="paper",
    )
    heads: Heads | None = option(
        None,
        parse=parse_heads,
        help="In place of sparsity: query heads to take out, by layer or attention module, as `prune` takes them.",
    )
    kept_channels: dict[str, str] | None = option(
        None,
        parse=parse_masks,
        help="In place of sparsity: MLP channels to keep, by the name of the self-attention of the layer: hexadecimal "
        "digits of four channels each, the first channel as the highest bit of the first digit.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        chosen = self.heads is not None or self.kept_channels is not None
        if chosen and self.sparsity is not None:
            raise ValueError("heads and kept_channels say what to take out: leave out sparsity.")
        if self.sparsity == 1.0:
            raise ValueError("sparsity=1.0 would take out everything; a layer must keep one head and one channel.")
        if self.metric == "amp" and self.structure == "al-am":
            raise ValueError(
                "metric='amp' compares within a layer alone: it needs structure='amp', as preset='amp', or 'ul-um'."
            )

    def to_dict(self) -> dict[str, Any]:
        if isinstance(self.statistics, FlapStatistics):
            return replace(self, statistics=None).to_dict()
        given = None if self.statistics is None else str(self.statistics)
        return {**super().to_dict(), "statistics": given}


class Flap(HeadSurgery):
    """Attention, and the MLP of its layer, without some of their heads and channels.

    The bias of a projection that reads them becomes `b + W[:, removed] @ mean[removed]`. Its values are known when the
    model is patched; a patch that is loaded gets them from its file, and is NaN until then.
    """

    config_class = FlapConfig
    config: FlapConfig
    even_choice = 'structure="ul-um" takes the same share of every layer; compensate=False adds no biases.'

    def __init__(self, config: FlapConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        self.pruned = heads_at(config.heads, site.name) or ()
        self.heads = KeptHeads.without(site, self.pruned)
        self.kept_channels = (config.kept_channels or {}).get(site.name)
        if self.is_identity and (config.heads or config.kept_channels):
            raise ValueError(f"'flap' is on {site.name}, but its settings name nothing to take out of {site.name}.")
        self.biases: list[str] = []

    @classmethod
    def fit(
        cls, config: FlapConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[FlapConfig, Sequence[AttentionSite]]:
        if config.sparsity == 0.0:
            return config, sites
        known = config.statistics
        if isinstance(known, str | Path):
            known = FlapStatistics.load(known)
        if known is not None:
            with concerning(config.statistics):
                known.check(model)
        if config.heads is not None or config.kept_channels is not None:
            heads = heads_by_module(config.heads or {}, model, sites)
            masks = masks_by_module(config.kept_channels or {}, model, sites)
            if config.compensate and known is None:
                raise ValueError("Biases are made of the means of channels: give statistics=..., or compensate=False.")
        elif config.sparsity is None or known is None:
            raise ValueError("FLAP needs sparsity=... and statistics=..., or heads=... or kept_channels=...")
        else:
            heads, masks = _least_important(config, known, model, sites)
        own = [site for site in sites if site.name in heads or site.name in masks]
        means = known if config.compensate else None
        return replace(config, statistics=means, sparsity=None, heads=heads or None, kept_channels=masks or None), own

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"statistics": None, "sparsity": 0.0, "heads": None, "kept_channels": None}

    @property
    def is_identity(self) -> bool:
        return not self.pruned and self.kept_channels is None

    def plan(self, model: nn.Module) -> list[Change]:
        if self.is_identity:
            return []
        changes: list[Change] = []
        removed: dict[str, torch.Tensor] = {}  # by the path of the projection that reads them
        if self.pruned or self.kept_channels is None:
            (read,) = [part for part in head_projections(model, self.site) if part.side == "columns"]
            changes += cut_heads(model, self.site, self.heads.kept)
            removed[read.projection] = read.index[list(self.pruned)].flatten()
        if self.kept_channels is not None:
            reader = mlp_projections(model, self.site)[1]
            count = channel_count(model, reader)
            kept = masked_channels(self.kept_channels, count)
            changes += cut_channels(model, self.site, kept)
            removed[reader] = torch.tensor([n for n in range(count) if n not in set(kept)], device="cpu")
        if self.config.compensate:
            changes += [Change(path, "bias", self._bias(model, path, index)) for path, index in removed.items()]
            self.biases = [f"{path}.bias" for path in removed]
        return changes

    @torch.no_grad()
    def _bias(self, model: nn.Module, path: str, removed: torch.Tensor) -> nn.Parameter:
        """`(E,)`, or NaN where only the file of a saved patch knows it."""
        view, known = LinearView.at(model, path), self.config.statistics
        weight = view.weight
        if not isinstance(known, FlapStatistics) or weight.is_meta:
            bias = weight.new_full((len(weight),), torch.nan)
        else:
            lost = known.of(model, path).mean[removed]
            bias = as_double(weight)[:, removed.to(weight.device)] @ lost.to(weight.device) + as_double(view.bias)
        return nn.Parameter(bias.to(weight), requires_grad=view.trains)

    def rename(self, site: AttentionSite, config: Any, renaming: Renaming) -> None:
        super().rename(site, config, renaming)
        self.biases = [renaming(name) for name in self.biases]

    def carried(self) -> list[str]:
        return self.biases

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        return inner(self.heads.renumbered(call) if self.pruned else call)


def _least_important(
    config: FlapConfig, known: FlapStatistics, model: nn.Module, sites: Sequence[AttentionSite]
) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Heads to take out, and masks of the channels to keep, by the name of the attention module."""
    try:
        modules = score_units(model, sites, known, config.metric, config.mlp)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"{error} Leave it out with modules=... or layers=..., or take out heads alone with mlp=False."
        ) from error
    share = config.sparsity or 0.0
    if config.structure == "amp":
        share = share_of_modules(model, modules, share)
    heads: dict[str, list[int]] = {}
    masks: dict[str, str] = {}
    for units, removed in zip(modules, lowest_units(modules, share, config.structure), strict=True):
        if removed and units.are_channels:
            count = len(units.scores)
            masks[units.site] = channel_mask(sorted(set(range(count)) - set(removed)), count)
        elif removed:
            heads[units.site] = [unit * units.heads + head for unit in removed for head in range(units.heads)]
    if not heads and not masks:
        raise ValueError(
            f"sparsity={config.sparsity} is less than a single head or channel: nothing would be taken out."
        )
    return heads, masks


register_variant(
    VariantInfo(
        name="flap",
        variant=Flap,
        title="Fluctuation-based Adaptive Structured Pruning for Large Language Models",
        arxiv_id="2312.11983",
        year=2023,
        code="https://github.com/CASIA-IVA-Lab/FLAP",
        summary="Heads and MLP channels that fluctuate least are taken out; their mean stays as a bias.",
        extra_parameters="none; fewer, but a bias for each projection that reads what was taken out",
        needs_training=False,
        presets={"amp": {"metric": "amp", "structure": "amp", "compensate": False}},
        examples=({"heads": {1: [0, 1]}, "compensate": False},),
    )
)
