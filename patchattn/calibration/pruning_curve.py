"""Pruning head by head: what a metric does as the least important heads go, scored anew on the way or once."""

import csv
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.heads import BaseFacts
from ..core.importance import HeadImportance, SiteScores
from ..core.patching import is_patched, patched
from ..inspection.channels import on_device
from ..inspection.head_importance import head_importance
from ..inspection.importance_methods import label_count, with_labels

Removed = dict[str, tuple[int, ...]]
Scores = dict[str, dict[int, float]]


@dataclass(frozen=True)
class CurvePoint:
    """A model with some heads removed.

    Attributes:
        removed: how many query heads.
        sparsity: their share of all.
        value: of the metric.
        heads: name of the attention module to its removed heads, for `patch_model(model, "prune", heads=...)`.
    """

    removed: int
    sparsity: float
    value: float
    heads: Removed


def pruning_curve(
    model: nn.Module,
    batches: Collection[Mapping[str, Any]],
    evaluate: Callable[[nn.Module], float],
    *,
    every: int,
    until: float = 0.9,
    method: str = "michel",
    recompute: bool = True,
    physical: bool = False,
    progress: Callable[[CurvePoint, int], None] | None = None,
    **options: Any,
) -> list[CurvePoint]:
    """Remove the least important heads step by step, and measure after each step.

    Heads of all layers are ranked together, and every attention module keeps one. With `recompute` they are scored anew
    on the pruned model after each step (the `exact pruning` of Michel et al.'s released script), else once.

    Args:
        model: an unpatched transformers model in evaluation mode; it is left as it was.
        batches: what heads are scored on, a list: it is gone through for every scoring.
        evaluate: measures the model; `perplexity` and `accuracy` here do it on batches.
        every: heads to remove in a step.
        until: share of the heads to remove in all; less where every attention module is down to one.
        method: of `head_importance`.
        recompute: score anew after every step.
        physical: take heads out of the weights, which is faster with many steps; else their output is masked.
        progress: called with every point, and how many heads will be removed in all.
        options: of `head_importance`: `per`, `metric`, `normalise`, ...

    Returns:
        The unpruned model first, then one point per step.

    Raises:
        ValueError: a patched or training model, a number out of range, or what `head_importance` raises.
        TypeError: batches that can be gone through only once.
    """
    if is_patched(model) or model.training:
        raise ValueError("The curve needs an unpatched model in evaluation mode: unpatch_model(model), model.eval().")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every is a number of heads, at least 1, got {every!r}.")
    if not 0.0 < until <= 1.0:
        raise ValueError(f"until is a share of the heads, above 0 and at most 1, got {until}.")
    if not isinstance(batches, Collection):
        raise TypeError(f"batches are gone through several times: give a list, got {type(batches).__name__}.")
    report = progress or (lambda point, most: None)
    scores = _by_head(head_importance(model, batches, method, **options), {})
    total = sum(map(len, scores.values()))
    most = min(int(until * total + 1e-9), total - len(scores))
    points = [CurvePoint(0, 0.0, float(evaluate(model)), {})]
    report(points[0], most)
    while (done := points[-1].removed) < most:
        count = min(every, most - done)
        heads = _joined(points[-1].heads, _lowest(scores, count))
        with patched(model, "prune", heads={name: list(gone) for name, gone in heads.items()}, physical=physical):
            points.append(CurvePoint(done + count, (done + count) / total, float(evaluate(model)), heads))
            if recompute and done + count < most:
                scores = _by_head(head_importance(model, batches, method, **options), heads if physical else {})
        scores = _without(scores, heads)
        report(points[-1], most)
    return points


def _by_head(importance: HeadImportance, taken_out: Removed) -> Scores:
    """Scores by the number that each head had before some were taken out of the weights."""
    found = {}
    for name, scores in importance.scores.items():
        gone = taken_out.get(name, ())
        numbers = [head for head in range(len(scores) + len(gone)) if head not in gone]
        found[name] = dict(zip(numbers, scores, strict=True))
    return found


def _without(scores: Scores, removed: Removed) -> Scores:
    return {name: {h: own[h] for h in own if h not in removed.get(name, ())} for name, own in scores.items()}


def _lowest(scores: Scores, count: int) -> Removed:
    sites = {name: SiteScores(0, 1, tuple(own.values())) for name, own in scores.items()}
    chosen = HeadImportance(sites, "", BaseFacts("", 0, 0)).lowest(count=count)
    return {name: tuple(list(scores[name])[place] for place in places) for name, places in chosen.items()}


def _joined(removed: Removed, more: Removed) -> Removed:
    return {name: tuple(sorted((*removed.get(name, ()), *more.get(name, ())))) for name in {**removed, **more}}


@torch.no_grad()
def perplexity(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float:
    """Of a language model: exp of its mean loss over all labels; a causal one takes its own tokens as labels.

    Raises:
        ValueError: a batch without labels, for another model, or no label at all.
    """
    total, count = 0.0, 0
    for given in batches:
        batch = with_labels(model, on_device(model, given))
        labels = label_count(model, batch)
        total += float(model(**batch).loss) * labels
        count += labels
    if not count:
        raise ValueError("There is no token to predict.")
    return math.exp(total / count)


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float:
    """Of a classifier: share of its labels that it gets right.

    Raises:
        ValueError: a batch without labels, or no batch.
    """
    right, count = 0, 0
    for given in batches:
        if "labels" not in given:
            raise ValueError("Accuracy needs labels in every batch.")
        batch = on_device(model, given)
        right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
        count += len(batch["labels"])
    if not count:
        raise ValueError("There is no example to classify.")
    return right / count


def write_curve(points: Sequence[CurvePoint], path: str | Path, *, metric: str = "value") -> None:
    """Write a curve as CSV: `removed`, `sparsity`, the metric under its name, and `heads` as JSON."""
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["removed", "sparsity", metric, "heads"])
        for point in points:
            writer.writerow([point.removed, point.sparsity, point.value, json.dumps(point.heads)])
