"""Twilight (arXiv 2502.02770) against loops over keys of four bits, and its cut on weights that are known."""

from typing import Any

import numpy as np
import pytest
import torch

import patchattn
from patchattn.reading.choose import holding_share
from patchattn.reading.index import of_four_bits

from .behaviour import decoded, text
from .families import FAMILIES, outputs
from .reference import DIM, layer_in_and_out, tiny_llama
from .selecting import assert_reads, attended, pages_by_bounds, projected, recorded

TOKENS = torch.arange(3, 27)[None]
ALL = {"dense_layers": 0, "prefill": "selected"}
BUDGETS = [(None, 16), (8, 2), (9, 3), (6, 1)]


def four_bits(key: np.ndarray) -> np.ndarray:
    """A key `(D,)` in sixteen even steps between its own least and greatest number."""
    step = (key.max() - key.min()) / 15
    return np.array([key.min() + round((x - key.min()) / step) * step for x in key])


def fewest(weights: dict[int, float], share: float) -> set[int]:
    """Of keys, those with the largest weights, as few as hold a share."""
    kept, total = set(), 0.0
    for j in sorted(weights, key=lambda j: -weights[j]):
        if total >= share:
            break
        kept.add(j)
        total += weights[j]
    return kept


def kept_by_loops(
    query: np.ndarray, key: np.ndarray, share: float, budget: int | None, page: int, heads: str
) -> list[list[set[int]]]:
    """Keys that each head of each token reads, of queries `(T, H, D)` and keys `(T, Hkv, D)`."""
    group = query.shape[1] // key.shape[1]
    pages = None if budget is None else pages_by_bounds(query, key, budget, page, heads)
    found = []
    for i in range(len(query)):
        rows = []
        for head in range(query.shape[1]):
            some = [j for j in range(i + 1) if pages is None or j // page in pages[i][head]]
            logits = np.array([four_bits(key[j, head // group]) @ query[i, head] / np.sqrt(DIM) for j in some])
            shares = np.exp(logits - logits.max())
            rows.append(fewest(dict(zip(some, shares / shares.sum(), strict=True)), share))
        if heads == "kv":
            rows = [set().union(*rows[head // group * group :][:group]) for head in range(len(rows))]
        found.append(rows)
    return found


@pytest.mark.parametrize("heads", ["kv", "query"])
@pytest.mark.parametrize(("budget", "page"), BUDGETS)
@pytest.mark.parametrize("share", [0.5, 0.85])
def test_a_token_reads_as_few_keys_as_hold_the_share(share: float, budget: int | None, page: int, heads: str) -> None:
    settings = {"top_p": share, "budget": budget, "page": page, "heads": heads}
    model = patchattn.patch_model(tiny_llama(), "twilight", **settings, **ALL)
    inputs, _ = layer_in_and_out(model, TOKENS)
    query, key, _ = projected(model.model.layers[0].self_attn, inputs[0])
    read = kept_by_loops(query, key, share, budget, page, heads)
    assert_reads(model, TOKENS, lambda head, i, j: j in read[i][head])


@pytest.mark.parametrize("heads", ["kv", "query"])
@pytest.mark.parametrize(("budget", "page"), BUDGETS)
def test_a_prompt_is_dense_and_each_token_behind_it_chooses(
    budget: int | None, page: int, heads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = tiny_llama(), recorded(monkeypatch)
    with torch.no_grad():
        prompt = model(TOKENS[:, :18]).logits
    settings: dict[str, Any] = {"budget": budget, "page": page, "heads": heads, "dense_layers": 0}
    patchattn.patch_model(model, "twilight", top_p=0.7, **settings)
    inputs, _ = layer_in_and_out(model, TOKENS)  # the only layer, so that keys do not depend on what is read
    query, key, _ = projected(model.model.layers[0].self_attn, inputs[0])
    calls.clear()
    assert torch.equal(decoded(model, TOKENS, [18, *[1] * 6])[:, :18], prompt)
    for i, (_, seen, _) in enumerate(calls[1:], 18):
        for head, read in enumerate(kept_by_loops(query[: i + 1], key[: i + 1], 0.7, budget, page, heads)[i]):
            assert set(seen[0, head, 0].nonzero().flatten().tolist()) == read


PRUNED = {
    "hip": {"budget": 9, "page": 1, "heads": "query", "dense_layers": 0},
    "quest": {"budget": 9, "page": 3, **ALL},
    "moba": {"block": 4, "top_k": 3},
    "streaming": {"sinks": 2, "recent": 7},
    "recycled": {"budget": 8, "every": 4},
}


@pytest.mark.parametrize("first", PRUNED)
def test_what_any_selection_leaves_is_pruned(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny_llama(), recorded(monkeypatch)
    settings = {first: PRUNED[first], "twilight": {"top_p": 0.7, "budget": None, "heads": "query", **ALL}}
    patchattn.patch_model(model, [first, "twilight"], settings)
    decoded(model, TOKENS, [18, *[1] * 6])
    pruned = 0
    for (call, given, output), (_, left, _) in zip(calls[1::2], calls[::2], strict=True):  # the inner one ends first
        query, key = call.query[0].numpy(), call.key[0].numpy()
        for head, i in np.ndindex(*query.shape[:2]):
            some = given[0, head, i].nonzero().flatten().tolist()
            logits = np.array([four_bits(key[head // 2, j]) @ query[head, i] / np.sqrt(DIM) for j in some])
            shares = np.exp(logits - logits.max())
            wanted = fewest(dict(zip(some, shares / shares.sum(), strict=True)), 0.7)
            assert set(left[0, head, i].nonzero().flatten().tolist()) == wanted
            pruned += len(some) - len(wanted)
        np.testing.assert_allclose(output.numpy(), attended(call, left.numpy()), rtol=1e-9, atol=1e-12)
    assert pruned > 0


def test_with_pages_of_its_own_it_is_refused_after_a_selection() -> None:
    both = {"hip": PRUNED["hip"], "twilight": {"top_p": 0.7, "budget": 8, **ALL}}
    model = patchattn.patch_model(FAMILIES["llama"].make(), ["hip", "twilight"], both)
    with pytest.raises(NotImplementedError, match="only some"):
        decoded(model, TOKENS, [23, 1])


def test_the_cut() -> None:
    """Order does not matter, equal weights stay together, and 1 keeps all that have a weight."""
    weights = torch.tensor([0.15, 0.5, 0.0, 0.05, 0.3])
    assert holding_share(weights, 0.85).tolist() == [True, True, False, False, True]
    assert holding_share(weights, 0.75).tolist() == [False, True, False, False, True]
    assert holding_share(weights, 0.5).tolist() == [False, True, False, False, False]
    assert holding_share(weights, 0.0).tolist() == [False, True, False, False, False]
    assert holding_share(weights, 1.0).tolist() == [True, True, False, True, True]
    assert holding_share(torch.tensor([0.25, 0.5, 0.25]), 0.6).tolist() == [True, True, True]
    assert holding_share(torch.zeros(3), 0.6).tolist() == [False] * 3


def test_keys_of_four_bits() -> None:
    keys = torch.tensor([[[[0.0, 15.0, 7.4, 7.6], [2.0, 2.0, 2.0, 2.0], [-3.0, 0.0, 4.4, 12.0]]]])
    rounded = [[0.0, 15.0, 7.0, 8.0], [2.0] * 4, [-3.0, 0.0, 4.0, 12.0]]
    torch.testing.assert_close(of_four_bits(keys), torch.tensor([[rounded]]))


def test_a_share_of_one_is_the_choice_of_pages_and_the_base_where_they_hold_the_text() -> None:
    model, tokens = FAMILIES["llama"].make(), text(12)
    base = outputs(model, input_ids=tokens)[0], decoded(model, tokens, [9, 1, 1, 1])
    results = {}
    for name, settings in {"twilight": {"top_p": 1.0}, "quest": {}}.items():
        with patchattn.patched(model, name, {**ALL, **settings, "budget": 4, "page": 2}):
            results[name] = outputs(model, input_ids=tokens)[0], decoded(model, tokens, [9, 1, 1, 1])
    for pages, quest, dense in zip(results["twilight"], results["quest"], base, strict=True):
        assert torch.equal(pages, quest)
        assert not torch.equal(pages, dense)
    with patchattn.patched(model, "twilight", top_p=1.0, budget=12, **ALL):
        assert torch.equal(outputs(model, input_ids=tokens)[0], base[0])
        assert torch.equal(decoded(model, tokens, [9, 1, 1, 1]), base[1])


def test_heads_of_a_layer_read_as_many_keys_as_they_need() -> None:
    model, densities = FAMILIES["llama"].make_exact(), []
    patchattn.patch_model(model, "twilight", top_p=0.6, budget=None, dense_layers=0)
    with patchattn.observe(model, lambda observation: densities.append(observation.values["density"])):
        decoded(model, text(40), [39, 1])
    for density in densities[2:]:  # of the step
        assert density.shape == (2, 1, 4)
        assert len(density.unique()) > 1
        assert bool((density < 1).all())


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="top_p must lie between 0"):
        patchattn.patch_model(tiny_llama(), "twilight", top_p=1.5)
