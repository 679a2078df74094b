"""Curves of pruning against a loop that cuts heads out of the weights by hand."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import patchattn
from patchattn.calibration.pruning_curve import CurvePoint, accuracy, perplexity, pruning_curve, write_curve
from patchattn.inspection.head_importance import head_importance
from patchattn.plotting import plot_pruning_curve

from .test_importance import HEADS, OUTPUTS, Batch, by_hand, examples, make, padded

SITES = list(OUTPUTS["llama"])


def evaluate(model: nn.Module) -> float:
    with torch.no_grad():
        return float(model(torch.arange(3, 15)[None]).logits.square().mean())


def zeroed(removed: dict[str, list[int]]) -> nn.Module:
    """The model whose output projection reads nothing of some heads."""
    model = make("llama")
    with torch.no_grad():
        for site, heads in removed.items():
            weight = model.get_submodule(OUTPUTS["llama"][site]).weight
            for head in heads:
                weight[:, 8 * head : 8 * head + 8] = 0.0
    return model


def lowest(scores: dict[str, list[float]], removed: dict[str, list[int]]) -> tuple[str, int]:
    may_go = [
        (score, site, head)
        for site in SITES
        for head, score in enumerate(scores[site])
        if head not in removed[site] and len(removed[site]) < HEADS - 1
    ]
    return min(may_go)[1:]


@pytest.mark.parametrize("physical", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_lowest_head_goes_and_the_others_are_scored_anew(recompute: bool, physical: bool) -> None:
    data = examples("llama", 3)
    model = make("llama")
    before = evaluate(model)
    seen: list[tuple[CurvePoint, int]] = []
    how: dict[str, Any] = {"recompute": recompute, "physical": physical, "per": "example"}
    points = pruning_curve(
        model, data, evaluate, every=2, progress=lambda point, most: seen.append((point, most)), **how
    )
    assert [(point, points[-1].removed) for point in points] == seen
    assert evaluate(model) == before
    assert not any("patchattn" in name for name, _ in model.named_modules())
    removed: dict[str, list[int]] = {site: [] for site in SITES}
    scores: dict[str, list[float]] = {}
    for number, point in enumerate(points):
        assert point.removed == 2 * number
        assert point.sparsity == pytest.approx(number / 4)
        assert point.heads == {site: tuple(sorted(heads)) for site, heads in removed.items() if heads}
        pruned = zeroed(removed)
        assert point.value == pytest.approx(evaluate(pruned), rel=1e-5)
        if recompute or not scores:
            found = by_hand("llama", pruned, [[example] for example in data], "example")
            scores = {site: list(np.array(own) / np.linalg.norm(own)) for site, own in found.items()}
        for _ in range(2):
            if sum(map(len, removed.values())) < 6:
                site, head = lowest(scores, removed)
                removed[site].append(head)
    assert len(points) == 4  # each of the two layers keeps a head


@pytest.mark.parametrize("method", ["michel", "flap", "amp", "entropy"])
def test_importance_of_a_pruned_model(method: str) -> None:
    model, data = make("llama"), [padded(examples("llama"))]
    heads = {SITES[0]: [0], SITES[1]: [1, 2, 3]}  # unequal groups, and a kv head less
    with patchattn.patched(model, "prune", heads=heads, physical=False):
        masked = head_importance(model, data, method, normalise=False)
    with patchattn.patched(model, "prune", heads=heads):
        cut = head_importance(model, data, method, normalise=False)
    for site in SITES:
        kept = [score for head, score in enumerate(masked.scores[site]) if head not in heads[site]]
        assert cut.scores[site] == pytest.approx(kept, rel=1e-4, abs=1e-7)


def test_a_curve_ends_where_it_is_told() -> None:
    points = pruning_curve(make("llama"), (), evaluate, every=3, until=0.5, method="random", seed=3)
    assert [point.removed for point in points] == [0, 3, 4]
    assert points[2].sparsity == 0.5


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"every": 0}, ValueError, "at least 1"),
        ({"every": True}, ValueError, "at least 1"),
        ({"until": 0.0}, ValueError, "until"),
        ({"until": 1.1}, ValueError, "until"),
        ({"batches": iter([])}, TypeError, "give a list"),
        ({"method": "michell"}, ValueError, "did you mean"),
        ({"metric": "wifv"}, ValueError, "takes per, loss"),
    ],
    ids=lambda value: re.sub(r" at 0x\w+", "", str(value)),  # the same in every process
)
def test_mistakes(how: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"batches": examples("llama", 1), "evaluate": evaluate, "every": 2, **how}
    with pytest.raises(error, match=message):
        pruning_curve(make("llama"), **arguments)


def test_a_patched_model_has_no_curve() -> None:
    model = patchattn.patch_model(make("llama"), "moh")
    with pytest.raises(ValueError, match="unpatched model"):
        pruning_curve(model, examples("llama"), evaluate, every=2)


def test_perplexity_of_all_tokens() -> None:
    model, data = make("llama"), examples("llama")
    losses = []
    for example in data:
        logits = model(**example).logits.detach()[0, :-1]
        losses += cross_entropy(logits, example["input_ids"][0, 1:], reduction="none").tolist()
    expected = float(np.exp(np.mean(losses)))
    assert perplexity(model, [padded(data[:2]), padded(data[2:])]) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="no token"):
        perplexity(model, [])
    with pytest.raises(ValueError, match="no labels"):
        perplexity(make("t5"), examples("llama", 1))


def test_accuracy_of_a_classifier() -> None:
    model, data = make("bert"), examples("bert")
    right = []
    for example in data:
        inputs: Batch = {name: value for name, value in example.items() if name != "labels"}
        right.append(int(model(**inputs).logits.argmax()) == int(example["labels"]))
    assert accuracy(model, [padded(data[:2]), padded(data[2:])]) == pytest.approx(np.mean(right))
    with pytest.raises(ValueError, match="labels"):
        accuracy(model, examples("llama", 1))
    with pytest.raises(ValueError, match="no example"):
        accuracy(model, [])


def curve() -> list[CurvePoint]:
    return [CurvePoint(0, 0.0, 10.0, {}), CurvePoint(2, 0.25, 12.5, {"a": (1, 3)})]


def test_a_file_of_a_curve(tmp_path: Path) -> None:
    write_curve(curve(), tmp_path / "curve.csv", metric="perplexity")
    first, second = csv.DictReader((tmp_path / "curve.csv").open())
    assert (first["removed"], first["sparsity"], first["perplexity"], first["heads"]) == ("0", "0.0", "10.0", "{}")
    assert (float(second["perplexity"]), json.loads(second["heads"])) == (12.5, {"a": [1, 3]})


def test_a_picture_of_curves(tmp_path: Path) -> None:
    figure = plot_pruning_curve({"michel": curve(), "random": curve()}, metric="perplexity", title="Pruned")
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == (
        "query heads removed, %",
        "perplexity",
        "Pruned",
    )
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["michel", "random"]
    assert [list(axes.get_lines()[0].get_xdata()), list(axes.get_lines()[0].get_ydata())] == [[0, 25], [10, 12.5]]
    figure.savefig(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    for wrong in ({}, {"michel": []}, {str(i): curve() for i in range(9)}):
        with pytest.raises(ValueError, match=r"curve"):
            plot_pruning_curve(wrong)
