"""Where a model attends: attention per key, maps of single heads, attention to the parts of a picture.

Attention is computed anew from the queries and keys that the base implementation gets, whichever it is, in a patched
model and in an unpatched one: after variants that change queries, keys or the mask, and before what they do to the
output. One head's queries x keys are held at a time. Of a variant that computes attention weights itself (`act`, `var`)
the weights that it returns are taken, and where the base implementation gives it none, what it makes of those computed
anew; all heads of a layer are then held.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from patchattn_kernels import KeyCounts, column_mass, key_counts

from ..core.call import AttentionCall
from ..core.patching import active_chains
from ..core.probing import recording
from ..core.registry import variant_info
from ..core.selection import base_model, evaluating, select_sites
from ..core.sites import AttentionSite
from ..vision.images import ImageSpan, image_layout, image_spans
from .probabilities import all_probabilities, attention_probabilities, seen_by_all_heads

SINK_FACTOR = 5.0  # ACT's alpha (arXiv 2406.15765): a sink gets that many times what it would if all got the same
SINK_SEEN = 0.25  # and is seen by that share of the queries or more


@dataclass(frozen=True, eq=False)
class ReceivedAttention:
    """Attention that the keys of one attention module receive.

    Attributes:
        site: the attention module.
        share: `(H, T)` float64: by query head and position, counted from the first token that is not padding, the mean
            attention of the queries that see the key, and then over the rows of the batch that are that long.
        uniform: `(T,)` float64: one over the most keys that any of those queries sees.
        seen: `(T,)` float64: how many queries see the key, over that number of keys.
    """

    site: AttentionSite
    share: torch.Tensor
    uniform: torch.Tensor
    seen: torch.Tensor

    def sinks(self, factor: float = SINK_FACTOR, least: float = SINK_SEEN) -> torch.Tensor:
        """`(H, T)` bool: which keys are attention sinks.

        By the rule of ACT, whose share is above `factor` times `uniform`; but of the keys alone that enough queries
        see. The last ones of a causal model are seen by few, which look at what is near: no sinks.
        """
        return (self.share > factor * self.uniform) & (self.seen >= least)


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """Attention of one head in one sequence, padding left out.

    Attributes:
        site: the attention module.
        head: query head.
        weights: `(rows, columns)` float64. Where several queries share a row, and several keys a column, a cell is the
            mean over the queries of the sum over the keys, so that rows have the sum 1 as in full attention.
        visible: `(rows, columns)` bool: where a query sees a key.
        queries, keys: index in the input of the first query of each row and of the first key of each column.
    """

    site: AttentionSite
    head: int
    weights: torch.Tensor
    visible: torch.Tensor
    queries: tuple[int, ...]
    keys: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ImageAttention:
    """Attention from text to the tokens of one picture.

    Attributes:
        span: the image's tokens.
        grid: `(rows, columns)` float64: attention to each token of the whole picture, the mean over queries, heads and
            layers.
        total: attention to all tokens of the image, the same mean.
        layers, heads: how many of them there are in the mean, heads in all layers together.
    """

    span: ImageSpan
    grid: torch.Tensor
    total: float
    layers: int
    heads: int


def attention_received(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    layers: int | Iterable[int] | None = None,
    modules: str | Iterable[str] | None = None,
) -> list[ReceivedAttention]:
    """Attention that each key receives, in memory linear in the length: where the attention sinks are.

    Args:
        model: a transformers model, patched or not.
        inputs: keyword arguments of one forward.
        layers: which layers, as in `patch_model`.
        modules: which attention modules, as in `patch_model`.

    Returns:
        One entry per attention module, in the order of the model.

    Raises:
        ValueError: no such layer or module; or a module attended more than once, or not at all.
        NotImplementedError: the model cannot be patched.
    """
    found: dict[str, ReceivedAttention] = {}

    def see(call: AttentionCall, own: torch.Tensor | None) -> None:
        rule, real = call.rule(), call.mask.real()
        if own is None:
            mass, _ = column_mass(call.query, call.key, rule, real=real)
        else:
            mass = (own.double() * real[:, None, :, None]).sum(dim=2)
        counts = key_counts(rule, call.query.shape[2], call.key.shape[2], call.key.device, real)
        if counts.rows.dim() == 3:
            seen_by_all_heads(call)  # or it refuses
            counts = KeyCounts(*(count[:, 0] for count in counts))
        found[call.site.name] = _received(call.site, mass, counts.rows, counts.longest)

    look(model, inputs, select_sites(base_model(model), layers=layers, modules=modules), see)
    return list(found.values())


def attention_maps(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    layers: int | Iterable[int] | None = None,
    modules: str | Iterable[str] | None = None,
    heads: Sequence[int] | None = None,
    row: int = 0,
    resolution: int | None = None,
) -> list[AttentionMap]:
    """Attention of heads in one sequence of a batch.

    Args:
        model: as in `attention_received`.
        inputs: likewise.
        layers: likewise.
        modules: likewise.
        heads: which query heads; all by default.
        row: which sequence of the batch.
        resolution: most rows and columns of a map, for pictures of many heads: neighbours are put together. By default
            none are, and each map is as large as attention.

    Returns:
        Layer by layer, and head by head in each.

    Raises:
        ValueError: no such layer, module, head or row; or as `attention_received`.
        NotImplementedError: as `attention_received`.
    """
    sites = select_sites(base_model(model), layers=layers, modules=modules)
    if resolution is not None and resolution < 1:
        raise ValueError(f"resolution must be at least 1, got {resolution}.")
    found: list[AttentionMap] = []

    def see(call: AttentionCall, own: torch.Tensor | None) -> None:
        visible, rows = of_row(call, row)
        columns = visible[rows].any(0).nonzero().flatten()
        mean, queries = _pooling(rows, resolution)
        total, keys = _pooling(columns, resolution)
        some = mean @ visible[rows][:, columns].cpu().double() @ total.mT > 0
        mean = mean / mean.sum(-1, keepdim=True)
        for head in _chosen_heads(call, heads):
            weights = head_weights(call, own, head, row, visible)[rows][:, columns].cpu().double()
            found.append(AttentionMap(call.site, head, mean @ weights @ total.mT, some, queries, keys))

    look(model, inputs, sites, see)
    return found


def image_attention(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    layers: int | Iterable[int] | None = None,
    heads: Sequence[int] | None = None,
    queries: Literal["last", "text"] | int = "last",
    row: int = 0,
    image: int = 0,
) -> ImageAttention:
    """Attention to the parts of a picture, in the language model of a vision-language model.

    Args:
        model: a LLaVA-1.5, LLaVA-NeXT or Qwen2.5-VL, patched or not.
        inputs: keyword arguments of one forward, as the processor makes them.
        layers: of the language model; all by default.
        heads: query heads of each; all by default.
        queries: whose attention: that of the last token, which the answer begins from; of all text after the image,
            mean; or of the token with that index.
        row: which sequence of the batch.
        image: which image of that sequence.

    Raises:
        ValueError: no such layer, head, row, image or token; a token before the image; or as `attention_received`.
        NotImplementedError: no vision-language model that is known, or one whose image tokens have no place in the
            picture (InstructBLIP); or as `attention_received`.
    """
    base: Any = base_model(model)
    ids, image_token = inputs["input_ids"], image_layout(base).image_token_id
    span, first, inside = image_place(base, inputs, row, image)
    grid: Any = span.grid
    grids: list[torch.Tensor] = []
    totals: list[float] = []
    seen: set[str] = set()

    def see(call: AttentionCall, own: torch.Tensor | None) -> None:
        visible, rows = of_row(call, row)
        asking = asking_rows(rows, ids[row], span, queries, image_token)
        seen.add(call.site.name)
        for head in _chosen_heads(call, heads):
            weights = head_weights(call, own, head, row, visible)[asking].mean(0).cpu().double()
            grids.append(weights[first : first + grid[0] * grid[1]].view(grid))
            totals.append(float(weights[span.start : span.stop].sum()))

    look(base, inputs, select_sites(base, layers=layers, modules=inside), see)
    return ImageAttention(span, torch.stack(grids).mean(0), sum(totals) / len(totals), len(seen), len(grids))


def image_place(model: nn.Module, inputs: Mapping[str, Any], row: int, image: int) -> tuple[ImageSpan, int, str]:
    """An image's tokens, the first of them that is a part of the whole picture, and what chooses the attention modules
    of the language model (`modules`).

    Raises:
        ValueError: no such row or image.
        NotImplementedError: no vision-language model that is known, or tokens that have no place in the picture.
    """
    layout = image_layout(model)
    sizes = {name: inputs[name] for name in ("image_sizes", "image_grid_thw") if name in inputs}
    spans = [span for span in image_spans(model, inputs["input_ids"], **sizes) if span.row == row]
    if not 0 <= image < len(spans):
        raise ValueError(f"Sequence {row} has {len(spans)} images; none has the index {image}.")
    span = spans[image]
    if span.grid is None:
        raise NotImplementedError(f"The image tokens of {type(model).__name__} have no place in the picture.")
    first = span.start + int(layout.has_class_token and not layout.skips_first)
    return span, first, rf"^{re.escape(layout.language_model)}\."


@torch.no_grad()
def look(
    model: nn.Module,
    inputs: Mapping[str, Any],
    sites: Sequence[AttentionSite],
    see: Callable[[AttentionCall, torch.Tensor | None], None],
) -> None:
    """Run the model once and show every call of these attention modules, with the weights of a variant's own."""
    computing = {name for name, chain in active_chains(base_model(model)).items() if _is_own(chain.names())}
    base, calls = base_model(model), Counter[str]()

    def seen(call: AttentionCall, output: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        calls[call.site.name] += 1
        if calls[call.site.name] > 1:
            raise ValueError(
                f"{call.site.name} attends several times in one forward, so that there is no single attention map to "
                "show. Leave it out with modules=..."
            )
        see(call, weights if call.site.name in computing else None)
        return output

    with evaluating(base), recording(base, sites, seen, at="base", weights=all_probabilities):
        base(**inputs)
    if missing := [site.name for site in sites if site.name not in calls]:
        raise ValueError(f"{missing[0]} was not run on these inputs. Leave it out with modules=...")


def _is_own(names: Sequence[str]) -> bool:
    return any(variant_info(name).innermost for name in names)


def head_weights(
    call: AttentionCall, own: torch.Tensor | None, head: int, row: int, visible: torch.Tensor
) -> torch.Tensor:
    """`(Tq, Tk)` attention of a head in one sequence: a variant's own, or what queries and keys give."""
    return attention_probabilities(call, head, visible[None, None])[row] if own is None else own[row, head]


def _received(site: AttentionSite, mass: torch.Tensor, rows: torch.Tensor, longest: torch.Tensor) -> ReceivedAttention:
    """Means over the rows of a batch, each without its padding; a key that no real query sees is padding."""
    mass = mass.cpu().double()
    rows, longest = (counts.expand(len(mass), -1).cpu() for counts in (rows, longest))
    real = rows > 0
    length = int(real.sum(-1).max())
    share = torch.zeros(mass.shape[1], length, dtype=torch.float64)
    uniform, queries, count = (torch.zeros(length, dtype=torch.float64) for _ in range(3))
    for one, seen, most, keep in zip(mass, rows, longest, real, strict=True):
        own = slice(0, int(keep.sum()))
        share[:, own] += one[:, keep] / seen[keep]
        uniform[own] += 1 / most[keep].double()
        queries[own] += seen[keep] / most[keep].double()
        count[own] += 1
    return ReceivedAttention(site, share / count, uniform / count, queries / count)


def of_row(call: AttentionCall, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What each query of one sequence sees, `(Tq, Tk)`, and the indices of its queries that are not padding."""
    batch = call.query.shape[0]
    if not 0 <= row < batch:
        raise ValueError(f"There is no sequence {row} in a batch of {batch}.")
    visible = seen_by_all_heads(call).expand(batch, -1, -1)[row]
    real = call.mask.real().expand(batch, visible.shape[0])[row] & visible.any(-1)
    return visible, real.nonzero().flatten()


def _chosen_heads(call: AttentionCall, heads: Sequence[int] | None) -> Sequence[int]:
    count = call.query.shape[1]
    if heads is None:
        return range(count)
    if wrong := [head for head in heads if not 0 <= head < count]:
        raise ValueError(f"{call.site.name} has the query heads 0 to {count - 1}, got {wrong[0]}.")
    return heads


def _pooling(places: torch.Tensor, resolution: int | None) -> tuple[torch.Tensor, tuple[int, ...]]:
    """`(cells, n)` of 0 and 1: which of n places are in which cell; and the first place of each cell."""
    count = len(places)
    cells = min(count, resolution or count)
    cell = torch.arange(count) * cells // max(count, 1)
    matrix = torch.nn.functional.one_hot(cell, cells).mT.double()
    return matrix, tuple(places[matrix.argmax(-1)].tolist())


def asking_rows(
    rows: torch.Tensor, ids: torch.Tensor, span: ImageSpan, queries: Literal["last", "text"] | int, image_token: int
) -> torch.Tensor:
    """Indices of the tokens whose attention is meant, of `rows` that are not padding."""
    after = rows[rows >= span.stop]
    text = after[ids[after] != image_token]
    if queries == "last":
        chosen = text[-1:]
    elif queries == "text":
        chosen = text
    elif isinstance(queries, int) and not isinstance(queries, bool):
        chosen = text[text == queries]
    else:
        raise TypeError(f'queries must be "last", "text" or the index of a token, got {queries!r}.')
    if not len(chosen):
        raise ValueError(
            f"queries={queries!r} chooses no token: text that sees the image has the indices {text.tolist()}."
        )
    return chosen
