"""Along which directions one token attends to another, and which heads before wrote there. arXiv 2410.00340.

*Sparse Attention Decomposition*: of the singular directions of a head's query and key weights a few carry an attended
pair. How large a share they are to carry was not found in the paper, and is a setting here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import nn

from ..core.call import AttentionCall
from ..core.linear import LinearView
from ..core.selection import base_model, input_device, select_sites
from ..core.sites import AttentionSite
from ..positions.looking import find_rotations
from ..positions.rotary import Rotary, Rotation
from ..surgery.projections import head_projections
from .tracing import Norm, Run, Traced, wide

Writers = dict[tuple[int, int], float]  # by layer and head


@dataclass(frozen=True, eq=False)
class AttentionDirections:
    """Why a head attends from one token to another.

    Attributes:
        site: the attention module.
        head: query head.
        logit: of the pair, without masks and what else is added to logits.
        terms: `(D,)` float64: what each pair of singular directions adds to it, in the order of singular values.
        used: which of them carry the share that was asked for: the fewest, the largest term first.
        query_writers: by (layer, head) of earlier layers what its output at the token that attends adds to the terms
            used, through the layer's norm as it is.
        key_writers: the same of the token that is attended to.
    """

    site: AttentionSite
    head: int
    logit: float
    terms: torch.Tensor
    used: tuple[int, ...]
    query_writers: Writers
    key_writers: Writers

    def strongest(self, count: int = 5) -> list[tuple[str, int, int, float]]:
        """(`query` or `key`, layer, head, what it adds), the largest first."""
        both = [("query", *place, value) for place, value in self.query_writers.items()]
        both += [("key", *place, value) for place, value in self.key_writers.items()]
        return sorted(both, key=lambda one: -one[3])[:count]


@torch.no_grad()
def attention_directions(
    model: nn.Module,
    ids: Sequence[int],
    *,
    layer: int,
    head: int,
    query: int,
    key: int,
    share: float = 0.9,
    modules: str | None = None,
) -> AttentionDirections:
    """Decompose the logit of one pair of tokens by the singular directions of a head's weights.

    With x what the layer's norm gives and W_Q^T W_K = sum s_k u_k v_k^T, the logit is sum s_k (x_i u_k)(x_j v_k) /
    sqrt(D). Biases of queries and keys are part of W, with a 1 behind x. Where positions rotate queries and keys, W_Q
    and W_K are those at the two tokens' positions, so that directions are of their distance.

    Args:
        model: a causal language model in evaluation mode, not quantised and without adapters.
        ids: one text.
        layer: of the head, from 0.
        head: query head, from 0.
        query: number of the token that attends, from 0.
        key: number of the token that it attends to, not behind it.
        share: of the logit, that the directions used carry; above 0 and up to 1.
        modules: which attention modules, as in `patch_model`, where the model has several towers.

    Raises:
        ValueError: a model in training mode, no such layer, head or token, a share out of range, or a logit that is not
            above 0, of which there is no share.
        TypeError: ids or numbers of tokens that are no whole numbers.
        NotImplementedError: a logit that the layer's normalised input, its weights and rotation do not give (normalised
            queries or keys), a norm behind attention, or projections that are not recognised.
    """
    base: Any = base_model(model)
    if base.training:
        raise ValueError("Directions of attention are read off a model in evaluation mode: model.eval().")
    sites = [site for site in select_sites(base, modules=modules) if not site.is_cross]
    if len({site.tower for site in sites}) > 1 or len({site.layer_index for site in sites}) < len(sites):
        raise ValueError(f"{type(base).__name__} has several towers: choose one with modules=...")
    site = next((each for each in sites if each.layer_index == layer), None)
    if site is None or not 0 <= head < site.require("query_heads", by="attention_directions"):
        raise ValueError(f"There is no head {head} of layer {layer} that attends to its own text.")
    if wrong := [one for one in (*ids, query, key) if not isinstance(one, Integral)]:
        raise TypeError(f"Tokens are told by numbers, got {wrong[0]!r}.")
    size = base.get_input_embeddings().num_embeddings
    if unknown := [token for token in ids if not 0 <= token < size]:
        raise ValueError(f"Tokens have ids from 0 to {size - 1}, got {unknown[0]}.")
    if not 0 <= key <= query < len(ids):
        raise ValueError(f"A token attends to one not behind it, of {len(ids)}, got {query} and {key}.")
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share is above 0 and up to 1, got {share}.")
    calls: dict[str, AttentionCall] = {}
    outputs: dict[str, torch.Tensor] = {}

    def see(call: AttentionCall, output: torch.Tensor) -> None:
        outputs[call.site.name] = wide(output)[0]
        if call.site.name == site.name:
            calls[site.name] = call

    def refused(reason: str) -> NotImplementedError:
        return NotImplementedError(f"{type(base).__name__}, head {head} of layer {layer}, is not decomposed: {reason}.")

    before = [each for each in sites if each.layer_index < layer]
    traced = Traced(base, torch.tensor([list(ids)], device=input_device(base)), [*before, site], see, refused)
    name = traced.maker(base.get_submodule(site.name), site.name)
    if name is None or site.name not in calls:
        raise refused("what it reads is not normalised in its layer")
    norm, run, call = traced.norm(name), traced.runs[name], calls[site.name]
    x_query, x_key = (_with_one(run.gave, place) for place in (query, key))
    logit = float((_double(call.query[0, head, query]) * _double(call.key[0, _group(call, head), key])).sum())
    logit *= float(call.scaling)
    left, right = _factors(base, site, head, query, key, x_query, x_key, call, logit, refused)
    if not logit > 0:
        raise ValueError(f"The logit of the pair is {logit:.3f}: there is no share of what is not above 0.")
    terms, onto_query, onto_key = _terms(left, right, x_query, x_key)
    order = terms.argsort(descending=True)
    count = int((terms[order].cumsum(0) < share * logit).sum()) + 1
    used = order[:count]
    written: list[Writers] = [{}, {}]
    for each in before:
        traced.check_added(each)
        output = next(part for part in head_projections(base, each) if part.side == "columns")
        weight = _double(LinearView.at(base, output.projection).weight)
        for number, columns in enumerate(output.index):
            for side, place, onto in ((0, query, onto_query), (1, key, onto_key)):
                added = weight[:, columns] @ _double(outputs[each.name][place, number])
                there = norm.linear(added.to(norm.gain)).double().cpu() / _size(norm, run, place)
                written[side][each.layer_index, number] = float((onto[:-1, used].mT @ there).sum())
    return AttentionDirections(site, head, logit, terms, tuple(sorted(used.tolist())), written[0], written[1])


def _factors(
    base: Any,
    site: AttentionSite,
    head: int,
    query: int,
    key: int,
    x_query: torch.Tensor,
    x_key: torch.Tensor,
    call: AttentionCall,
    logit: float,
    refused: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(E + 1, D)` each, whose product, between the two tokens, is the logit: as the weights are, or rotated."""
    parts = head_projections(base, site)
    of_query, of_key = parts[0], next(part for part in parts if part.of == "kv")  # in front of that of values
    group = head * len(of_key.index) // len(of_query.index)
    sides = []
    for part, number in ((of_query, head), (of_key, group)):
        view, rows = LinearView.at(base, part.projection), part.index[number]
        sides.append(torch.cat([_double(view.weight)[rows], _double(view.bias)[rows, None]], dim=1).mT)
    left, right = sides[0] * float(call.scaling), sides[1]
    size = float((x_query @ left).norm() * (x_key @ right).norm())
    precision = 1e-4 if call.query.dtype in (torch.float32, torch.float64) else 2e-2

    def agrees() -> bool:
        return abs(float(x_query @ left @ right.mT @ x_key) - logit) <= precision * size

    if agrees():
        return left, right
    rotation = Rotation.from_dict(find_rotations(base, [site], by="attention_directions")[site.name])
    rotary = Rotary(rotation, base)
    left, right = (
        rotary.turned(side[None, None], torch.zeros(1, len(side)), torch.full((1, len(side)), float(place)))[0, 0]
        for side, place in ((left, query), (right, key))
    )
    if not agrees():
        raise refused("its logit is not what its weights and positions make of the layer's normalised input")
    return left, right


def _terms(
    left: torch.Tensor, right: torch.Tensor, x_query: torch.Tensor, x_key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(D,)` terms, and `(E + 1, D)` what makes terms of another vector in the place of either token's."""
    (q_left, r_left), (q_right, r_right) = torch.linalg.qr(left), torch.linalg.qr(right)
    u, sizes, v = torch.linalg.svd(r_left @ r_right.mT)
    u, v = q_left @ u, q_right @ v.mT
    onto_query, onto_key = u * sizes * (x_key @ v), v * sizes * (x_query @ u)
    return x_query @ onto_query, onto_query, onto_key


def _with_one(given: torch.Tensor | None, place: int) -> torch.Tensor:
    """`(E + 1,)` float64."""
    if given is None:
        raise ValueError("The layer's norm gave nothing.")
    return torch.cat([_double(given[0, place]), torch.ones(1, dtype=torch.float64)])


def _size(norm: Norm, run: Run, place: int) -> float:
    """What the norm has divided a token by."""
    if run.given is None or run.gave is None:
        raise ValueError("The layer's norm got nothing.")
    before, after = norm.linear(wide(run.given[0, place])).double(), (wide(run.gave[0, place]) - norm.bias).double()
    return float(before.square().sum() / (before * after).sum())


def _group(call: AttentionCall, head: int) -> int:
    return head * call.key.shape[1] // call.query.shape[1]


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().double()
