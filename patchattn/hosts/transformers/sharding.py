"""Which heads of its attention modules a process holds, where `from_pretrained(..., tp_plan=...)` shared them out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...core.linear import LinearView
from ...core.shards import own_tensor
from ...core.sites import AttentionSite, HeadShard


def find_shards(model: nn.Module, sites: Sequence[AttentionSite]) -> dict[str, HeadShard]:
    """The share of this process, by attention module, without those that every process computes whole.

    Raises:
        NotImplementedError: query heads and kv heads are not shared out alike.
    """
    if own_tensor(model) is None:
        return {}
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(module, FSDPModule) for module in model.modules()):  # gathers weights before they compute
        return {}
    found = {site.name: _shard(model.get_submodule(site.name), site) for site in sites}
    return {name: shard for name, shard in found.items() if shard is not None}


def _shard(module: nn.Module, site: AttentionSite) -> HeadShard | None:
    like = own_tensor(module)
    roles = [role for role in ("query", "key", "value", "fused") if role in site.projections]
    if like is None or like.is_meta or not roles or None in (site.query_heads, site.kv_heads):
        return None
    parts = {role: _part(module, site.projections[role]) for role in roles}
    ranks, mesh = like.device_mesh.size(), like.device_mesh
    if set(parts.values()) == {1.0}:
        return None
    heads: tuple[Any, Any] = (site.query_heads, site.kv_heads)
    if mesh.ndim != 1 or set(parts.values()) != {1 / ranks} or any(count % ranks for count in heads):
        shares = ", ".join(f"{role} {part:.3g}" for role, part in parts.items())
        raise NotImplementedError(
            f"{type(module).__name__} ({site.name}) has {heads[0]} query heads and {heads[1]} kv heads, which {ranks} "
            f"processes do not share out evenly: of its projections this one holds ({shares}). Use a number of "
            "processes that divides both."
        )
    return HeadShard(mesh.get_local_rank(), ranks, *heads)


def _part(module: nn.Module, child: str) -> float:
    """Which part of a projection's output this process computes, seen of one token: some gather what they computed."""
    projection = module.get_submodule(child)
    view = LinearView.at(module, child)
    like = next(parameter for parameter in projection.parameters() if parameter.is_floating_point())
    with torch.no_grad():
        output = projection(torch.zeros(1, 1, view.in_features, dtype=like.dtype, device=like.device))
    size: int = output.shape[-1]
    return size / view.out_features
