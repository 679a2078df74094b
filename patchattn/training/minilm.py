"""MiniLM: a student learns how its teacher's last layer relates tokens. arXiv 2002.10957, 2012.15828."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from ..core.call import AttentionCall
from ..core.probing import probed
from ..core.selection import base_model, select_sites
from ..inspection.probabilities import all_probabilities


@dataclass(eq=False)
class AttentionStreams:
    """Queries, keys and values of one attention module in its latest forward.

    Attributes:
        call: of attention; `None` before the first.
        projected: `query` and `key` as their projections gave them, `(B, T, W)`, where these were asked for.
    """

    call: AttentionCall | None = None
    projected: dict[str, torch.Tensor] = field(default_factory=dict)

    def latest(self) -> AttentionCall:
        """The call; ValueError if there was none."""
        if self.call is None:
            raise ValueError(
                "No attention was recorded: run the model within `with attention_streams(model) as streams:`."
            )
        return self.call

    def stream(self, name: str) -> torch.Tensor:
        """`(B, T, W)` the query, key or value, heads side by side, in float32 at least."""
        found: torch.Tensor = getattr(self.latest(), name)
        found = self.projected.get(name, found.transpose(1, 2).flatten(2))
        return found.to(torch.promote_types(found.dtype, torch.float32))


@contextmanager
def attention_streams(
    model: nn.Module,
    layer: int = -1,
    *,
    rotary: Literal["after", "before"] = "after",
    modules: str | Iterable[str] | None = None,
) -> Iterator[AttentionStreams]:
    """Record what one layer of a model attends with, for `minilm_loss`.

    Args:
        model: a student or a teacher, patched or not.
        layer: which layer; negative ones are counted from the last.
        rotary: queries and keys after rotary embedding and norms, as attention gets them, or as their projections give
            them (`before`).
        modules: which attention modules, as in `patch_model`, where the model has several towers.

    Yields:
        What holds the streams of the latest forward.

    Raises:
        ValueError: no such layer, or several attention modules in it.
        NotImplementedError: `before` in a layer whose queries or keys have no projection of their own.
    """
    if rotary not in ("after", "before"):
        raise ValueError(f'rotary must be "after" or "before", got {rotary!r}.')
    base = base_model(model)
    sites = select_sites(base, modules=modules)
    wanted = layer if layer >= 0 else max(site.layer_index for site in sites) + 1 + layer
    chosen = [site for site in sites if site.layer_index == wanted]
    if len(chosen) != 1:
        raise ValueError(
            f"There are {len(chosen)} attention modules in layer {layer} of {type(base).__name__}, expected one: "
            "choose with layer=... and modules=..."
        )
    (site,), streams = chosen, AttentionStreams()

    def see(call: AttentionCall, output: torch.Tensor) -> None:
        streams.call = call

    def keep(name: str) -> Any:
        return lambda module, args, output: streams.projected.__setitem__(name, output)

    with ExitStack() as stack:
        for name in ("query", "key") if rotary == "before" else ():
            if name not in site.projections:
                raise NotImplementedError(
                    f'{site.name} has no projection of its own for the {name}: use rotary="after".'
                )
            projection = base.get_submodule(f"{site.name}.{site.projections[name]}")
            stack.callback(projection.register_forward_hook(keep(name)).remove)
        stack.enter_context(probed(base, see, layers=wanted, modules=f"^{site.name}$".replace(".", r"\.")))
        yield streams


def minilm_loss(
    student: AttentionStreams,
    teacher: AttentionStreams,
    *,
    version: Literal["v2", "v1"] = "v2",
    relation_heads: int | None = None,
    weights: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3),
) -> torch.Tensor:
    """How far a student's relations between tokens are from a teacher's, on one batch.

    `v2` (2012.15828): queries, keys and values of all heads, side by side, are cut into relation heads. Of each stream
    X, `KL(teacher || student)` of the rows of `softmax(X X^T / sqrt(width of a relation head))`, the three weighted and
    added. `v1` (2002.10957): the same of attention's own rows, plus that of `softmax(V V^T / sqrt(head size))` of each
    head. Both are sums over real rows, over the number of heads and of real tokens, and means over sequences; columns
    of padding are left out of every softmax.

    Args:
        student: of `attention_streams`, after a forward.
        teacher: likewise, on the same tokens. Nothing goes back into it.
        version: of the paper.
        relation_heads: of v2: must divide the widths of all streams, of which keys and values are narrower in
            grouped-query attention. By default the number of the teacher's query heads.
        weights: of v2: of queries, keys and values.

    Returns:
        A scalar with gradients.

    Raises:
        ValueError: other tokens, numbers of heads that differ (v1), relation heads that do not divide a width, an
            unknown version, or nothing recorded.
    """
    ours, theirs = student.latest(), teacher.latest()
    real = ours.mask.real().expand(ours.query.shape[0], -1)
    if ours.query.shape[0] != theirs.query.shape[0] or ours.query.shape[2] != theirs.query.shape[2]:
        raise ValueError(
            f"Student and teacher must see the same tokens, got {ours.query.shape[0]} x {ours.query.shape[2]} and "
            f"{theirs.query.shape[0]} x {theirs.query.shape[2]}."
        )
    if version == "v1":
        for name in ("query", "value"):
            heads = [getattr(call, name).shape[1] for call in (ours, theirs)]
            if heads[0] != heads[1]:
                raise ValueError(
                    f"v1 compares head by head, but the student has {heads[0]} {name} heads and the teacher "
                    f'{heads[1]}; version="v2" does without.'
                )
        attention = _mean_divergence(_log(all_probabilities(ours)), _log(all_probabilities(theirs)), real)
        count = ours.value.shape[1]
        own, other = (_relation(one, "value", count, real) for one in (student, teacher))
        return attention + _mean_divergence(own, other, real)
    if version != "v2":
        raise ValueError(f'version must be "v1" or "v2", got {version!r}.')
    count = theirs.query.shape[1] if relation_heads is None else relation_heads
    parts = []
    for name, weight in zip(("query", "key", "value"), weights, strict=True):
        own, other = (_relation(one, name, count, real) for one in (student, teacher))
        parts.append(weight * _mean_divergence(own, other, real))
    return torch.stack(parts).sum()


def _relation(streams: AttentionStreams, name: str, count: int, real: torch.Tensor) -> torch.Tensor:
    """`(B, count, T, T)` logarithm of how tokens relate in one stream."""
    stream = streams.stream(name)
    width = stream.shape[-1]
    if count < 1 or width % count:
        raise ValueError(f"{count} relation heads do not divide the width {width} of the {name} stream.")
    heads = stream.unflatten(-1, (count, -1)).transpose(1, 2)
    scores = heads @ heads.mT * (width // count) ** -0.5
    return scores.masked_fill(~real[:, None, None], torch.finfo(scores.dtype).min).log_softmax(-1)


def _log(probabilities: torch.Tensor) -> torch.Tensor:
    return probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()


def _mean_divergence(student: torch.Tensor, teacher: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """KL of rows `(B, H, T, T)`, summed over real ones, over heads and real tokens; mean over sequences."""
    teacher = teacher.detach()
    rows = (teacher.exp() * (teacher - student)).sum(-1) * real[:, None]
    return (rows.sum((1, 2)) / (student.shape[1] * real.sum(-1).clamp(min=1))).mean()
