"""What single heads are for: a place beside the token, rare tokens, a memorised text, an answer that hangs on a date.

After *positional* heads, memorisation heads (arXiv 2403.19851) and temporal heads (arXiv 2502.14258). None of the three
is scored by a published formula here: those were not found, or are circuits of one model. Each function says its own.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from patchattn_kernels.rows import blocks, full_precision, row_logits

from ..core.call import AttentionCall
from ..core.heads import BaseFacts
from ..core.importance import HeadImportance, SiteScores
from ..core.linear import LinearView
from ..core.probing import probed, recording
from ..core.selection import base_model, select_sites
from ..core.sites import AttentionSite
from ..surgery.projections import head_projections
from .attention_maps import attention_received
from .channels import on_device
from .task_vectors import last_logits


@torch.no_grad()
def position_scores(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    offset: int = -1,
    modules: str | Iterable[str] | None = None,
) -> HeadImportance:
    """How often each head attends most to the token at one distance: positional heads.

    Of the rows that see the key at that distance and another one besides, the share whose largest weight, the first of
    equal ones, is there. `settings["chance"]` is what heads would score that look anywhere: the mean over heads and
    those rows of one over the number of keys that a row sees.

    Args:
        model: a transformers model in evaluation mode, patched or not.
        batches: keyword arguments of its forward, with padding on either side.
        offset: -1 is the token before, 0 the token itself, 1 the next one, which a causal model does not see.
        modules: which attention modules, as in `patch_model`.

    Raises:
        ValueError: a model in training mode, no data, or no row that sees such a key.
        NotImplementedError: keys are not the tokens of the text, one by one; or a variant computes attention itself.
    """
    base, sites = _checked(model, modules)
    hits = {site.name: torch.zeros(_heads(site), dtype=torch.float64) for site in sites}
    rows, chance = ({name: torch.zeros_like(each) for name, each in hits.items()} for _ in range(2))

    def see(call: AttentionCall, output: torch.Tensor) -> None:
        length, name = call.query.shape[2], call.site.name
        if call.mask.index is not None or call.key.shape[2] != length or call.query.shape[1] != len(hits[name]):
            raise NotImplementedError(f"Keys of {name} are not the tokens of the text, one by one.")
        query, key, rule = full_precision(call.query), full_precision(call.key), call.rule()
        real = call.mask.real().expand(len(query), -1)
        for part in blocks(length, query.shape[0] * query.shape[1] * length):
            logits = row_logits(query, key, rule, part)
            own = torch.arange(length, device=query.device)[part] + offset
            there = ((own >= 0) & (own < length))[None] & real[:, part]
            seen = logits > float("-inf")
            number = seen.sum(-1)  # (B, H, C)
            place = own.clamp(0, length - 1)[None, None, :, None].expand(*number.shape, 1)
            counted = there[:, None] & seen.gather(-1, place)[..., 0] & (number > 1)
            hits[name] += ((logits.argmax(-1) == place[..., 0]) & counted).sum((0, 2)).cpu()
            rows[name] += counted.sum((0, 2)).cpu()
            chance[name] += (counted / number.clamp(min=1).double()).sum((0, 2)).cpu()

    with probed(base, see, modules=[f"^{site.name}$" for site in sites], at="base"):
        for batch in batches:
            base(**on_device(base, batch))
    if empty := [name for name, count in rows.items() if not bool(count.all())]:
        raise ValueError(
            f"No row of {empty[0]} sees the key at the distance {offset} and another one: give longer texts, another "
            "offset, or leave it out with modules=..."
        )
    scores = {name: (hits[name] / rows[name]).tolist() for name in hits}
    mean = float(torch.cat([chance[name] / rows[name] for name in rows]).mean())
    tokens = max(int(count.max()) for count in rows.values())
    return _importance(base, sites, scores, "position", {"offset": offset, "chance": mean}, tokens)


@torch.no_grad()
def rarity_scores(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    counts: torch.Tensor | Sequence[float] | None = None,
    modules: str | Iterable[str] | None = None,
) -> HeadImportance:
    """How much each head attends to rare tokens: memorisation heads look there, arXiv 2403.19851 says.

    Spearman's correlation, over a text's tokens but the first, which is often a sink, between the attention that a
    token receives, the mean over the rows that see it, and -ln of how frequent it is; the mean over texts.

    Args:
        model: a transformers model in evaluation mode, patched or not.
        batches: `input_ids` and, with padding, `attention_mask`.
        counts: `(V,)` how frequent every id is, in any unit, above 0; by default one more than how often it comes in
            `batches`.
        modules: which attention modules, as in `patch_model`.

    Raises:
        ValueError: a model in training mode, no text of three tokens of unlike frequency, or counts below 0 or too few.
        NotImplementedError: as `attention_received`.
    """
    base, sites = _checked(model, modules)
    given = list(batches)
    frequency = _frequencies(given) if counts is None else torch.as_tensor(counts, dtype=torch.float64)
    sums = {site.name: torch.zeros(_heads(site), dtype=torch.float64) for site in sites}
    texts = tokens = 0
    for batch in given:
        for ids, mask in _rows(batch):
            kept = ids[mask.bool()].cpu()[1:]
            if len(kept) and (int(kept.max()) >= len(frequency) or not bool((frequency[kept] > 0).all())):
                raise ValueError(f"counts needs a number above 0 of every id, up to {int(kept.max())} in these texts.")
            rare = -frequency[kept].log()
            if len(kept) < 2 or bool((rare == rare[0]).all()):
                continue
            inputs = on_device(base, {"input_ids": ids[None], "attention_mask": mask[None]})
            names = [f"^{site.name}$" for site in sites]
            for received in attention_received(base, inputs, modules=names):
                sums[received.site.name] += _spearman(received.share[:, 1:], rare)
            texts, tokens = texts + 1, tokens + len(kept) + 1
    if not texts:
        raise ValueError("No text has three tokens or more, of unlike frequency.")
    scores = {name: (total / texts).tolist() for name, total in sums.items()}
    return _importance(base, sites, scores, "rarity", {"texts": texts}, tokens)


def gradient_scores(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, modules: str | Iterable[str] | None = None
) -> HeadImportance:
    """How much of each head's weights a text would change: the gradient map of memorised paragraphs, arXiv 2403.19851.

    The sum of the sizes of the gradients of a text's mean loss, over the weights of the head's query and output
    projection and those of the key and value that it reads; the mean over texts. Heads that share a key and value count
    its weights each.

    Args:
        model: a causal language model in evaluation mode, not quantised and without adapters.
        batches: `input_ids` and, with padding, `attention_mask`: paragraphs.
        modules: which attention modules, as in `patch_model`.

    Raises:
        ValueError: a model in training mode, no data, weights that take no gradients, or an adapter.
        NotImplementedError: projections that are not recognised, or quantised.
    """
    base, sites = _checked(model, modules)
    parts = {site.name: head_projections(base, site) for site in sites}
    paths = sorted({part.projection for some in parts.values() for part in some})
    views = {path: LinearView.at(base, path) for path in paths}
    weights: list[Any] = [view.module.weight for view in views.values()]
    if frozen := [path for path, view in views.items() if not view.trains]:
        raise ValueError(f"{frozen[0]} takes no gradients: model.requires_grad_(True).")
    sums = {site.name: torch.zeros(_heads(site), dtype=torch.float64) for site in sites}
    texts = tokens = 0
    for batch in batches:
        for ids, mask in _rows(batch):
            given = on_device(base, {"input_ids": ids[None], "attention_mask": mask[None]})
            real = given["attention_mask"].bool()
            if int(real.sum()) < 2:
                continue
            logits = base(**given, use_cache=False).logits[0][real[0]]
            known = given["input_ids"][real].to(logits.device)
            loss = nn.functional.cross_entropy(logits[:-1].float(), known[1:])
            gradients = torch.autograd.grad(loss, weights)
            sizes = {
                path: (gradient.mT if view.stores_inputs_first else gradient).abs()
                for (path, view), gradient in zip(views.items(), gradients, strict=True)
            }
            for site in sites:
                for part in parts[site.name]:
                    whole = sizes[part.projection].double().cpu()
                    of_each = whole.sum(1 if part.side == "rows" else 0)[part.index].sum(-1)
                    sums[site.name] += of_each.repeat_interleave(_heads(site) // len(of_each))
            texts, tokens = texts + 1, tokens + int(real.sum())
    if not texts:
        raise ValueError("There is no text of two tokens or more.")
    scores = {name: (total / texts).tolist() for name, total in sums.items()}
    return _importance(base, sites, scores, "gradient", {"texts": texts}, tokens)


@torch.no_grad()
def ablation_scores(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    answers: Iterable[Sequence[int]],
    *,
    modules: str | Iterable[str] | None = None,
) -> HeadImportance:
    """How much less likely the right answer is without each head, in nats: its output is zero at every token.

    Temporal heads (arXiv 2502.14258) are those whose score on prompts with a date, "In 2009, the president of ...", is
    far above that on the same prompts without: take the difference by `minus`. A forward for every head and batch.

    Args:
        model: a causal language model in evaluation mode.
        batches: prompts, with padding on either side.
        answers: for every batch the id of the right answer's first token, of each sequence.
        modules: which attention modules, as in `patch_model`.

    Raises:
        ValueError: a model in training mode, no data, or answers that are not one a sequence.
    """
    base, sites = _checked(model, modules)
    sums = {site.name: [0.0] * _heads(site) for site in sites}
    now: list[tuple[str, int]] = []
    prompts = tokens = 0

    def see(call: AttentionCall, output: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        if not now or now[0][0] != call.site.name:
            return output
        new = output.clone()
        new[:, :, now[0][1]] = 0
        return new

    with recording(base, sites, see):
        for batch, right in zip_longest(batches, answers):
            if batch is None or right is None:
                raise ValueError("There are not as many lists of answers as batches.")
            given = on_device(base, batch)
            ids = torch.tensor(list(right), device=given["input_ids"].device)
            if ids.shape != (len(given["input_ids"]),):
                raise ValueError(f"There are {len(ids)} answers for {len(given['input_ids'])} sequences.")
            before = _log_likelihood(base, given, ids)
            for site in sites:
                for head in range(_heads(site)):
                    now[:] = [(site.name, head)]
                    sums[site.name][head] += float((before - _log_likelihood(base, given, ids)).sum())
            now.clear()
            prompts, tokens = prompts + len(ids), tokens + given["input_ids"].numel()
    if not prompts:
        raise ValueError("There are no prompts to leave heads out on.")
    scores = {name: [total / prompts for total in totals] for name, totals in sums.items()}
    return _importance(base, sites, scores, "ablation", {"prompts": prompts}, tokens)


def minus(scores: HeadImportance, other: HeadImportance, method: str) -> HeadImportance:
    """Differences of two scores of the same heads, under a name of their own.

    Raises:
        ValueError: they are of other heads.
    """
    if {name: len(of) for name, of in scores.scores.items()} != {name: len(of) for name, of in other.scores.items()}:
        raise ValueError(f"Scores of {scores.base} and of {other.base} are not of the same heads.")
    sites = {
        name: SiteScores(
            site.layer,
            site.kv_heads,
            tuple(a - b for a, b in zip(site.scores, other.sites[name].scores, strict=True)),
        )
        for name, site in scores.sites.items()
    }
    return HeadImportance(sites, method, scores.base, scores.settings, scores.tokens + other.tokens)


def _checked(model: nn.Module, modules: Any) -> tuple[Any, list[AttentionSite]]:
    base = base_model(model)
    if base.training:
        raise ValueError("Scores of heads need a model in evaluation mode: model.eval().")
    return base, [site for site in select_sites(base, modules=modules) if not site.is_cross]


def _heads(site: AttentionSite) -> int:
    return site.require("query_heads", by="A score of heads")


def _importance(
    base: nn.Module,
    sites: Sequence[AttentionSite],
    scores: Mapping[str, Sequence[float]],
    method: str,
    settings: dict[str, Any],
    tokens: int,
) -> HeadImportance:
    found = {
        site.name: SiteScores(
            site.layer_index, site.require("kv_heads", by="A score of heads"), tuple(scores[site.name])
        )
        for site in sites
    }
    return HeadImportance(found, method, BaseFacts.of(base, sites[0]), settings, tokens)


def _log_likelihood(base: Any, given: Mapping[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """`(B,)` natural logarithm of the probability of an id after each sequence."""
    shares = full_precision(last_logits(base, given)).log_softmax(-1)
    return shares.gather(1, ids[:, None].to(shares.device))[:, 0].double()


def _rows(batch: Mapping[str, Any]) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and mask of every text."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    return zip(ids, torch.ones_like(ids) if mask is None else mask, strict=True)


def _frequencies(batches: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """`(V,)` one more than how often each id comes."""
    ids = [ids[mask.bool()].cpu() for batch in batches for ids, mask in _rows(batch)]
    return torch.bincount(torch.cat(ids)).double() + 1 if ids else torch.ones(0, dtype=torch.float64)


def _spearman(values: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`(H,)` rank correlations of `(H, n)` with `(n,)`; 0 where all values are equal."""
    ranks = torch.stack([_ranks(row) for row in (*values, other)])
    ranks = ranks - ranks.mean(-1, keepdim=True)
    length = ranks.norm(dim=-1)
    return ((ranks[:-1] @ ranks[-1]) / (length[:-1] * length[-1])).nan_to_num(0.0)


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks from the smallest on; equal values share the mean of theirs."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[place].double()
