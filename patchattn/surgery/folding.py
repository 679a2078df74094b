"""Writing factors of heads into the weights of the projections that make or read them."""

from typing import Any, Literal

import torch
from torch import nn

from ..core.linear import LinearView
from ..core.sites import AttentionSite
from .projections import Heads, head_projections


def fold_factors(
    model: nn.Module, site: AttentionSite, of: Literal["query", "value", "output"], factors: torch.Tensor
) -> None:
    """Give a model weights with which what heads are made of, or what they give, comes multiplied.

    The parameters are exchanged, not written to: other models may share them.

    Args:
        model: with the attention module.
        site: it.
        of: what is multiplied.
        factors: `(H,)`, of values `(Hkv,)`.

    Raises:
        NotImplementedError: the projections are not recognised, or queries are normalised behind them.
    """
    if of == "query" and site.query_norm is not None:
        raise NotImplementedError(f"queries are normalised by {site.query_norm} behind their projection")
    query, _, value, output = head_projections(model, site)
    _multiply(model, {"query": query, "value": value, "output": output}[of], factors)


@torch.no_grad()
def _multiply(model: nn.Module, part: Heads, factors: torch.Tensor) -> None:
    layer: Any = model.get_submodule(part.projection)
    index = part.index.to(layer.weight.device)
    are_rows = (part.side == "rows") != LinearView.at(model, part.projection).stores_inputs_first
    each = torch.ones(layer.weight.shape[0 if are_rows else 1], dtype=torch.float64, device=layer.weight.device)
    each[index] = factors.double().to(each.device)[:, None].expand(*index.shape)
    weight = layer.weight.double() * (each[:, None] if are_rows else each)
    layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
    if part.side == "rows" and layer.bias is not None:
        layer.bias = nn.Parameter((layer.bias.double() * each).to(layer.bias.dtype), layer.bias.requires_grad)
