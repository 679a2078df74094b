"""HiP attention (arXiv 2406.09827) against a tree that is searched by loops, in prompts and while decoding."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import patchattn
from patchattn.core.places import Places
from patchattn.reading.choose import down_a_tree
from patchattn.variants.selection import hip
from patchattn.variants.selection.hip import HiP

from .behaviour import close, decoded, positions, text
from .families import FAMILIES, outputs
from .reference import layer_in_and_out, tiny_llama
from .selecting import Recorded, assert_reads, assert_texts_are_apart, projected, recorded

TOKENS = torch.arange(3, 32)[None]
ALL = {"dense_layers": 0, "queries": 1}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    return recorded(monkeypatch)


def searched(score: dict[int, float], first: int, end: int, count: int) -> set[int]:
    """Pages from `first` to `end` that are left of `count` parts: each is halved, and the best `count` halves stay."""
    size = end - first
    parts = [(first + size * p // count, first + size * (p + 1) // count) for p in range(count)]
    parts = [(low, high) for low, high in parts if low < high]
    while any(high - low > 1 for low, high in parts):
        halves = []
        for low, high in parts:
            middle = low + (high - low + 1) // 2
            halves += [(low, middle), (middle, high)] if high - low > 1 else [(low, high)]
        halves.sort(key=lambda half: -score[(half[0] + half[1]) // 2])  # stable: of equal ones the first
        parts = sorted(halves[:count])
    return {low for low, _ in parts}


def by_loops(
    query: np.ndarray, key: np.ndarray, budget: int, page: int, heads: str, start: int = 0
) -> list[list[set[int]]]:
    """Pages that each head of each token reads, of queries `(T, H, D)` and keys `(T, Hkv, D)`, text from `start` on."""
    group, count, found = query.shape[1] // key.shape[1], -(-budget // page), []
    for i in range(len(query)):
        own, rows = i // page, []
        for head in range(query.shape[1]):
            kv = head // group
            asking = range(kv * group, (kv + 1) * group) if heads == "kv" else [head]
            score = {
                p: max(query[i, h] @ key[j, kv] for h in asking for j in range(max(p * page, start), (p + 1) * page))
                for p in range(start // page, own)
            }
            before = searched(score, start // page, own, count - 1) if count > 1 and i >= start else set()
            rows.append({own} | before)
        found.append(rows)
    return found


@pytest.mark.parametrize(
    ("budget", "page", "heads"), [(6, 1, "query"), (9, 2, "kv"), (8, 2, "query"), (2, 2, "kv"), (12, 3, "query")]
)
def test_parts_are_halved_and_the_best_stay(budget: int, page: int, heads: str) -> None:
    model = patchattn.patch_model(tiny_llama(), "hip", budget=budget, page=page, heads=heads, **ALL)
    inputs, _ = layer_in_and_out(model, TOKENS)
    query, key, _ = projected(model.model.layers[0].self_attn, inputs[0])
    read = by_loops(query, key, budget, page, heads)
    assert_reads(model, TOKENS, lambda head, i, j: j // page in read[i][head])


@pytest.mark.parametrize("heads", ["query", "kv"])
def test_single_tokens_choose_as_those_of_a_prompt_from_few_scores(heads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, taken, select, take = [], [], HiP.select, hip.taken

    def selecting(self: HiP, call: Any) -> Any:
        kept.append(select(self, call))
        return kept[-1]

    def taking(keys: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        taken.append(index.shape[-1])
        return take(keys, index)

    monkeypatch.setattr(HiP, "select", selecting)
    monkeypatch.setattr(hip, "taken", taking)
    model = patchattn.patch_model(tiny_llama(), "hip", budget=6, page=2, heads=heads, **ALL)
    whole = outputs(model, input_ids=TOKENS)[0]
    kept.clear()
    close(decoded(model, TOKENS, [21, 1, 1, 5, 1]), whole)
    assert [isinstance(keep, Places) for keep in kept] == [False, True, True, False, True]
    # two parts of 10 pages at most: three times four pages, of two keys each
    assert set(taken) == {2 * 4 if heads == "kv" else 2 * 4 * 2}
    short = outputs(model, input_ids=TOKENS[:, :15])[0]
    close(decoded(model, TOKENS[:, :15], [13, 1, 1], kind="static"), short)


@pytest.mark.parametrize(
    ("budget", "page", "heads", "queries"), [(6, 1, "query", 4), (8, 2, "kv", 8), (4, 2, "query", 3)]
)
def test_tokens_of_a_block_share_the_choice_of_the_highest_among_them(
    budget: int, page: int, heads: str, queries: int
) -> None:
    settings = {**ALL, "budget": budget, "page": page, "heads": heads, "queries": queries}
    model = patchattn.patch_model(tiny_llama(), "hip", **settings)
    inputs, _ = layer_in_and_out(model, TOKENS)
    query, key, _ = projected(model.model.layers[0].self_attn, inputs[0])
    count, found = -(-budget // page), {}
    for start in range(0, len(query), queries):
        rows = range(start, min(start + queries, len(query)))
        for head in range(4):
            asking = range(head // 2 * 2, head // 2 * 2 + 2) if heads == "kv" else [head]
            end = rows[-1] // page  # the last one's own page is behind the tree
            score = {
                p: max(
                    (
                        query[i, h] @ key[j, head // 2]
                        for i in rows
                        for h in asking
                        for j in range(p * page, p * page + page)
                        if j <= i
                    ),
                    default=-np.inf,
                )
                for p in range(end)
            }
            tree = searched(score, 0, end, count - 1)
            found.update({(i, head): tree | {i // page} for i in rows})
    assert_reads(model, TOKENS, lambda head, i, j: j // page in found[i, head])


def test_blocks_of_queries_are_counted_from_the_start_of_each_text() -> None:
    model = patchattn.patch_model(
        FAMILIES["llama"].make_exact(), "hip", **{**ALL, "budget": 3, "page": 1, "queries": 4}
    )
    for side in ("left", "right"):
        assert_texts_are_apart(model, side)


def test_padding_inside_a_page_is_no_key(calls: Recorded) -> None:
    model = patchattn.patch_model(tiny_llama(), "hip", budget=6, page=2, **ALL)
    mask = torch.ones_like(TOKENS)
    mask[:, :5] = 0
    with torch.no_grad():
        model(TOKENS, attention_mask=mask, position_ids=positions(mask))
    call, seen, _ = calls[0]
    query, key = (tensor[0].transpose(0, 1).numpy() for tensor in (call.query, call.key))
    read = by_loops(query, key, 6, 2, "query", start=5)
    for head, i in np.ndindex(4, 29):
        want = {j for j in range(5, i + 1) if j // 2 in read[i][head]} if i >= 5 else set()
        assert set(seen[0, head, i].nonzero().flatten().tolist()) == want


def test_a_choice_lasts_and_pages_begun_since_are_read(calls: Recorded) -> None:
    model = patchattn.patch_model(tiny_llama(), "hip", budget=4, page=2, heads="kv", refresh=4, **ALL)
    decoded(model, TOKENS[:, :24], [19, *[1] * 5])
    read = [{j // 2 for j in seen[0, 0, -1].nonzero().flatten().tolist()} for _, seen, _ in calls[1:]]
    at_20, at_21, at_22, at_23, at_24 = read
    assert at_21 == at_20 | {10} == at_22
    assert at_23 == at_20 | {10, 11}
    assert len(at_24) == 2


@pytest.mark.parametrize("size", [5, 16, 37])
def test_scores_that_rise_along_the_text_give_the_best_pages(size: int) -> None:
    ends = torch.full((1, 1, 1), size)
    for scores, want in (
        (torch.arange(size), set(range(size - 4, size))),
        (torch.zeros(size), searched(dict.fromkeys(range(size), 0.0), 0, size, 4)),
    ):
        of_pages = scores.double().expand(1, 1, 1, -1)
        found = down_a_tree(torch.zeros_like(ends), ends, size, 4, partial(torch.gather, of_pages, -1))
        assert set(found.flatten().nonzero().flatten().tolist()) == want


def test_a_budget_that_holds_the_text_and_the_first_layers_are_the_base_bit_for_bit() -> None:
    model, tokens = FAMILIES["llama"].make(), text(12)
    expected, cached = outputs(model, input_ids=tokens)[0], decoded(model, tokens, [9, 1, 2])
    for settings in ({"budget": 12, **ALL}, {"budget": None, **ALL}, {"budget": 3, "dense_layers": 2}):
        with patchattn.patched(model, "hip", **settings):
            assert torch.equal(outputs(model, input_ids=tokens)[0], expected)
            assert torch.equal(decoded(model, tokens, [9, 1, 2]), cached)
    with patchattn.patched(model, "hip", budget=4, prefill="dense", **ALL):
        assert torch.equal(outputs(model, input_ids=tokens)[0], expected)
        assert not torch.equal(decoded(model, tokens, [9, 1, 2]), cached)
