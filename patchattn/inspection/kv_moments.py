"""`kv_moments`: what must be known of a model's data so that kv heads can be merged."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..core.call import AttentionCall
from ..core.host import find_sites
from ..core.probing import probed
from ..core.selection import base_model
from ..core.sites import AttentionSite
from ..surgery.kv_merge import KvMoments, Moments, merged_projections
from ..surgery.projections import Heads
from .channels import on_device

_NONE = torch.empty(0, 2, dtype=torch.long)


@torch.no_grad()
def kv_moments(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, sites: Iterable[AttentionSite] | None = None
) -> KvMoments:
    """Moments of the inputs of attention, over tokens that are no padding, in one pass; a few thousand tokens do.

    Args:
        model: a transformers model in evaluation mode, in whose attention kv heads are to be merged.
        batches: keyword arguments of its forward; tensors are moved to its device.
        sites: those of `find_sites(model)`; by default all.

    Returns:
        For `patch_model(model, "gqa_convert", moments=...)`.

    Raises:
        ValueError: no data, a model in training mode or without weights, or an attention module that the data does not
            reach.
        NotImplementedError: heads cannot be told apart.
    """
    base = base_model(model)
    if base.training:
        raise ValueError("kv_moments needs a model in evaluation mode: model.eval().")
    if any(parameter.is_meta for parameter in base.parameters()):
        raise ValueError(f"{type(base).__name__} has parameters without values: load its weights first.")
    chosen = {site.name: site for site in (find_sites(base) if sites is None else sites)}
    parts = {name: merged_projections(base, site) for name, site in chosen.items()}
    sums: dict[str, torch.Tensor] = {}
    found: dict[str, tuple[torch.Tensor, str | None]] = {}

    def see(call: AttentionCall, output: torch.Tensor) -> None:
        name, states = call.site.name, call.context.layer_input()
        if name not in found:
            found[name] = turned_together(base, call, parts[name], states)
        rows = states[call.mask.real().expand(states.shape[:2])].cpu().double()
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        sums[name] = sums.get(name, 0.0) + rows.mT @ rows

    with probed(base, see, modules=list(chosen)):
        for batch in batches:
            base(**on_device(base, batch))
    missing = [name for name in chosen if name not in sums or not sums[name][-1, -1]]
    if missing:
        raise ValueError(f"The data does not reach {missing[0]}: give batches, or leave it out with modules=...")
    return KvMoments({name: Moments(sums[name] / sums[name][-1, -1], *found[name]) for name in chosen})


def turned_together(
    model: nn.Module, call: AttentionCall, parts: list[Heads], states: torch.Tensor
) -> tuple[torch.Tensor, str | None]:
    """Which channels of queries and keys rotary embedding turns together: those whose common length it leaves alone.

    Of neighbours that are left alone it says so too: a pair that turns too slowly to be seen looks the same, and what
    holds of pairs holds of them.

    Args:
        model: it.
        call: of attention, without cached keys.
        parts: projections of queries, keys and values.
        states: `(B, T, E)` what they read.

    Returns:
        `(P, 2)` pairs of channels, all others being what the projection made; and why that is not so.
    """
    before, after = [], []
    for part, states_after in zip(parts[:3], (call.query, call.key, call.value), strict=True):
        module: Any = model.get_submodule(part.projection)
        made = module(states)[..., part.index.to(states.device)].transpose(1, 2)  # (B, heads, T, D)
        if made.shape != states_after.shape:
            return _NONE, f"its projections give {tuple(made.shape)}, attention gets {tuple(states_after.shape)}"
        before.append(made.double())
        after.append(states_after.double())
    # Models make the tables of rotary embedding in float32 at best.
    tolerance = max(torch.finfo(dtype).eps for dtype in (call.query.dtype, torch.float32)) ** 0.5
    if not _alike(before[2], after[2], tolerance):
        return _NONE, "what attention gets as values is not what the projection made"
    pair_of = list(zip(before[:2], after[:2], strict=True))
    if all(_alike(made, got, tolerance) for made, got in pair_of):
        return _NONE, None
    dim = before[1].shape[-1]
    for size in range(dim - dim % 2, 0, -2):
        channel = torch.arange(size)
        for pairs in (channel.view(2, -1).mT, channel.view(-1, 2)):
            if all(_keeps_lengths(made, got, pairs, size, tolerance) for made, got in pair_of):
                return pairs, None
    return _NONE, "queries and keys are not what the projections made, turned by pairs of channels: a norm comes after"


def _alike(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    return bool((one - other).abs().max() <= tolerance * one.abs().max())


def _keeps_lengths(before: torch.Tensor, after: torch.Tensor, pairs: torch.Tensor, size: int, tolerance: float) -> bool:
    """Whether pairs are as long as they were, up to one factor for all, and channels from `size` on what they were."""
    old, new = (each[..., pairs.to(each.device)].square().sum(-1) for each in (before, after))
    factor = new.sum() / old.sum()
    return _alike(old * factor, new, tolerance) and (
        size == before.shape[-1] or _alike(before[..., size:], after[..., size:], tolerance)
    )
