"""Head pruning: chosen query heads are taken out of the model, or masked. After arXiv 1905.10650."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ...core.call import AttentionCall
from ...core.heads import Heads
from ...core.importance import HeadImportance
from ...core.registry import register_variant
from ...core.settings import option
from ...core.sites import AttentionSite
from ...core.variant import Attend, AttentionOutput, VariantConfig, VariantInfo
from ...files.documents import concerning, quoted
from ...inspection.head_importance import head_importance
from ...surgery.change import Change
from ...surgery.folding import fold_factors
from ...surgery.heads import HeadSurgery, KeptHeads, cut_heads, heads_at, heads_by_module, parse_heads

_DATA_FREE = ("magnitude", "random")


@dataclass(frozen=True, kw_only=True)
class PruneConfig(VariantConfig):
    """Settings of head pruning; every field is described by `patchattn info prune`."""

    by_module = ("heads",)

    heads: Heads | None = option(
        None,
        parse=parse_heads,
        help="Query heads to take out: a mapping from layers, or from names of attention modules, to heads; pairs of "
        "(layer, head); or a JSON file with one of these. A layer must keep one.",
    )
    sparsity: float | None = option(
        None,
        help="Share of the query heads of the chosen attention modules to take out, the least important first, "
        "rounded down; in place of heads.",
        unit="ratio",
        minimum=0.0,
        maximum=1.0,
    )
    importance: str | Path | HeadImportance | None = option(
        None,
        help="With sparsity: a file that `patchattn calibrate heads` wrote, what patchattn.head_importance returned, "
        f"or a score that needs no data: {' or '.join(_DATA_FREE)}.",
    )
    scope: Literal["global", "layer"] = option(
        "global",
        help="With sparsity: rank all heads together, or take the same share of every layer.",
        source="paper, Sec. 4 (global)",
    )
    groups: Literal["heads", "kv"] = option(
        "heads",
        help="With sparsity, where several query heads share a kv head: take out single query heads, or all of a kv "
        "head together, which also shrinks the kv cache.",
    )
    uniform: bool = option(
        False,
        help="With sparsity: take the same number from every layer and, where query heads share a kv head, from those "
        "of each, rounded down, so that a plain configuration can say it (`patchattn export`). scope is then layer.",
    )
    physical: bool = option(
        True, help="Take the heads out of the weights; false masks their output instead and saves nothing."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads is not None:
            if self.sparsity is not None or self.importance is not None:
                raise ValueError("heads=... names the heads to take out: leave out sparsity and importance.")
            if self.uniform:
                raise ValueError("uniform=True chooses heads by sparsity=...: leave it out where heads=... names them.")
        elif self.sparsity == 1.0:
            raise ValueError("sparsity=1.0 would take out every head; a layer must keep at least one.")
        elif self.sparsity and self.importance is None:
            raise ValueError(
                f"sparsity needs importance=...: a file of `patchattn calibrate heads`, or one of "
                f"{', '.join(_DATA_FREE)}."
            )


class Prune(HeadSurgery):
    """Attention without some of its query heads.

    A kv head goes with the last of its query heads. Where a kv head keeps fewer query heads than another, keys and
    values are repeated to the query heads before attention.
    """

    config_class = PruneConfig
    config: PruneConfig
    even_choice = (
        "uniform=True takes equally many query heads from all layers and kv heads; physical=False leaves shapes alone "
        "and masks heads, which becomes zeros in the output projection."
    )

    def __init__(self, config: PruneConfig, site: AttentionSite) -> None:
        super().__init__(config, site)
        pruned = heads_at(config.heads, site.name)
        if config.heads is not None and pruned is None:
            raise ValueError(f"'prune' is on {site.name}, but its settings do not name the heads of {site.name}.")
        self.pruned = pruned or ()
        self.heads = KeptHeads.without(site, self.pruned)

    @classmethod
    def fit(
        cls, config: PruneConfig, model: nn.Module, sites: Sequence[AttentionSite]
    ) -> tuple[PruneConfig, Sequence[AttentionSite]]:
        if config.heads is not None:
            heads = heads_by_module(config.heads, model, sites)
        elif config.sparsity:
            heads = _least_important(config, model, sites)
        elif config.sparsity is None:
            raise ValueError("Head pruning needs heads=..., or sparsity=... with importance=...; got neither.")
        else:
            return config, sites
        return replace(config, heads=heads, sparsity=None, importance=None, uniform=False), [
            s for s in sites if s.name in heads
        ]

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"heads": None, "sparsity": 0.0}

    @property
    def is_identity(self) -> bool:
        return not self.pruned

    def plan(self, model: nn.Module) -> list[Change]:
        if self.is_identity or not self.config.physical:
            return []
        return cut_heads(model, self.site, self.heads.kept)

    def fold(self, plain: nn.Module) -> None:
        if not self.config.physical:
            factors = torch.ones(self.heads.total)
            factors[list(self.pruned)] = 0.0
            fold_factors(plain, self.site, "output", factors)

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        if self.config.physical:
            return inner(self.heads.renumbered(call))
        output, weights = inner(call)
        if output.shape[2] != self.heads.total:
            raise NotImplementedError(
                f"'prune' masks some of {self.heads.total} heads of {self.site.name}, and a later variant took out "
                "others: name 'prune' with physical=False after it."
            )
        keep = torch.ones(output.shape[2], 1, dtype=output.dtype, device=output.device)
        keep[list(self.pruned)] = 0.0
        return output * keep, weights


def _least_important(config: PruneConfig, model: nn.Module, sites: Sequence[AttentionSite]) -> dict[str, list[int]]:
    given: Any = config.importance
    if isinstance(given, HeadImportance):
        importance = given
    elif given in _DATA_FREE:
        importance = head_importance(model, [], method=given, sites=sites)
    elif os.path.isfile(given):
        importance = HeadImportance.load(given)
    else:
        raise ValueError(
            f"importance={quoted(str(given))} is neither a file nor one of {', '.join(_DATA_FREE)}. Scores that need "
            "data are made by `patchattn calibrate heads` or patchattn.head_importance(model, batches)."
        )
    with concerning(given):
        importance.check(model)
    wanted = [site.name for site in sites]
    if missing := [name for name in wanted if name not in importance.sites]:
        raise ValueError(f"There are no scores of {missing[0]}: choose modules that have with modules=...")
    chosen = replace(importance, sites={name: importance.sites[name] for name in wanted})
    if config.uniform:
        heads = chosen.lowest_of_each(config.sparsity or 0.0, groups=config.groups == "kv")
    else:
        heads = chosen.lowest(sparsity=config.sparsity, scope=config.scope, groups=config.groups == "kv")
    if not heads and config.uniform:
        raise ValueError(
            f"sparsity={config.sparsity} with uniform=True is less than a query head of every kv head, or with "
            "groups='kv' less than a kv head: nothing would be taken out."
        )
    if not heads:
        raise ValueError(f"sparsity={config.sparsity} is less than a single head: nothing would be taken out.")
    return {name: list(numbers) for name, numbers in heads.items()}


register_variant(
    VariantInfo(
        name="prune",
        variant=Prune,
        title="Are Sixteen Heads Really Better than One?",
        arxiv_id="1905.10650",
        year=2019,
        code="https://github.com/pmichel31415/are-16-heads-really-better-than-1",
        summary="Chosen query heads are taken out of the model, or masked.",
        extra_parameters="none; fewer",
        needs_training=False,
        examples=({"heads": {0: [1], 1: [0, 3]}},),
    )
)
