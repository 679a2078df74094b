"""LServe's page selection (arXiv 2502.14866) against loops over pages, smaller pages and tokens."""

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import patchattn
from patchattn.core.kv_caches import cache_argument

from .behaviour import close, decoded, text
from .families import FAMILIES, outputs
from .reference import layer_in_and_out, tiny_llama
from .selecting import Recorded, assert_reads, bound, projected, recorded

TOKENS = torch.arange(3, 34)[None]
ALL = {"prefill": "selected", "refresh": 1}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    return recorded(monkeypatch)


def pages_of(query: np.ndarray, key: np.ndarray, budget: int, page: int, logical: int, heads: str) -> list[set[int]]:
    """Pages that each head of one token `(H, D)` reads, the last of the keys `(N, Hkv, D)` its own."""
    own, group, found = (len(key) - 1) // page, len(query) // key.shape[1], []
    for head in range(len(query)):
        kv = head // group
        asking = range(kv * group, (kv + 1) * group) if heads == "kv" else [head]
        bounds = [
            max(
                bound(query[one], key[start : start + logical, kv])
                for one in asking
                for start in range(p * page, (p + 1) * page, logical)
            )
            for p in range(own)
        ]
        others = np.argsort(-np.array(bounds), kind="stable")[: -(-budget // page) - 1] if own else []
        found.append({own, *(int(p) for p in others)})
    return found


@pytest.mark.parametrize("heads", ["kv", "query"])
@pytest.mark.parametrize(("budget", "page", "logical"), [(8, 4, 2), (9, 3, 1), (6, 2, 2), (12, 6, 2)])
def test_a_page_scores_by_the_best_of_its_smaller_ones(budget: int, page: int, logical: int, heads: str) -> None:
    settings = {"budget": budget, "page": page, "logical": logical, "heads": heads}
    model = patchattn.patch_model(tiny_llama(), "lserve", **settings, **ALL)
    inputs, _ = layer_in_and_out(model, TOKENS)
    query, key, _ = projected(model.model.layers[0].self_attn, inputs[0])
    read = [pages_of(query[i], key[: i + 1], **settings) for i in range(len(query))]
    assert_reads(model, TOKENS, lambda head, i, j: j // page in read[i][head])


@pytest.mark.parametrize("heads", ["kv", "query"])
def test_a_choice_lasts_until_the_keys_are_a_multiple_and_later_pages_are_read(heads: str, calls: Recorded) -> None:
    model = tiny_llama()
    settings = {"budget": 6, "page": 2, "logical": 1, "heads": heads}
    patchattn.patch_model(model, "lserve", **settings, refresh=4)
    inputs, _ = layer_in_and_out(model, TOKENS)
    query, key, _ = projected(model.model.layers[0].self_attn, inputs[0])
    calls.clear()
    decoded(model, TOKENS, [13, *[1] * 18])
    made: list[set[int]] = []
    several = set()
    for i, (_, seen, _) in enumerate(calls[1:], 13):
        if (i + 1) % 4 == 0 or not made:
            made, first = pages_of(query[i], key[: i + 1], **settings), i
        for head in range(4):
            want = {j for j in range(i + 1) if j // 2 in made[head] or j // 2 > first // 2}
            assert set(seen[0, head, 0].nonzero().flatten().tolist()) == want
        several.add(i - first)
    assert several == {0, 1, 2, 3}


def test_what_was_chosen_by_tokens_that_were_taken_back_is_forgotten(calls: Recorded) -> None:
    model, tokens = FAMILIES["llama"].make_exact(), text(26)
    patchattn.patch_model(model, "lserve", budget=4, page=2, logical=1, refresh=4)
    other, cache = tokens.flip(-1), DynamicCache(config=model.config)
    outputs(model, input_ids=tokens[:, :15], **cache_argument(model, cache))
    for step in range(3):  # a choice is made with 16 keys
        outputs(model, input_ids=other[:, step : step + 1], **cache_argument(model, cache))
    cache.crop(-3)
    parts = [2, 1, 1, 1, 1]
    found = [
        outputs(model, input_ids=part, **cache_argument(model, cache))[0] for part in tokens[:, 15:21].split(parts, 1)
    ]
    close(torch.cat(found, dim=1), decoded(model, tokens[:, :21], [15, *parts])[:, 15:])


def test_choices_follow_their_sequences() -> None:
    """Beams are reordered between the making of a choice and its use."""
    model, tokens = FAMILIES["llama"].make_exact(), text(20, rows=2)
    patchattn.patch_model(model, "lserve", budget=4, page=2, logical=1, refresh=4)
    cache = DynamicCache(config=model.config)
    for part in tokens[:, :17].split([15, 1, 1], 1):
        outputs(model, input_ids=part, **cache_argument(model, cache))
    cache.reorder_cache(torch.tensor([1, 0]))
    swapped = outputs(model, input_ids=tokens[:, 17:18].flip(0), **cache_argument(model, cache))[0]
    close(swapped.flip(0), decoded(model, tokens[:, :18], [15, 1, 1, 1])[:, -1:])


def test_a_budget_that_holds_the_text_is_the_base_bit_for_bit() -> None:
    model, tokens = FAMILIES["llama"].make(), text(12)
    expected, cached = outputs(model, input_ids=tokens)[0], decoded(model, tokens, [9, 1, 1, 1])
    for settings in ({"budget": 12}, {"budget": None}):
        with patchattn.patched(model, "lserve", **settings, page=2, logical=1, **ALL):
            assert torch.equal(outputs(model, input_ids=tokens)[0], expected)
            assert torch.equal(decoded(model, tokens, [9, 1, 1, 1]), cached)
    with patchattn.patched(model, "lserve", budget=4, page=2, logical=1):
        found = decoded(model, tokens, [9, 1, 1, 1])
        assert torch.equal(found[:, :9], cached[:, :9])
        assert not torch.equal(found[:, 9:], cached[:, 9:])


def test_settings_and_models_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="page must be a multiple of logical=16, got 40"):
        patchattn.patch_model(tiny_llama(), "lserve", page=40)
    with pytest.raises(NotImplementedError, match="leaves out layers with a sliding window"):
        patchattn.patch_model(FAMILIES["mistral"].make(), "lserve")
