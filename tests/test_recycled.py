"""Recycled attention (arXiv 2411.05787) against loops: which keys are read when, after the prompt and again."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache

import patchattn
from patchattn.core.kv_caches import cache_argument
from patchattn.reading.selection import narrowed
from patchattn.variants.selection.recycled import Recycled

from .behaviour import close, decoded, positions, text
from .families import FAMILIES, outputs
from .reference import DIM, HEADS, KV_HEADS, tiny_llama
from .selecting import Recorded, attended, recorded

TOKENS = torch.arange(3, 27)[None]
SETTINGS = {"budget": 4, "every": 3}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    return recorded(monkeypatch)


def most(query: np.ndarray, key: np.ndarray, count: int, first: int = 0) -> list[set[int]]:
    """By kv head the keys with the largest weights, of a query `(H, D)` and keys `(Hkv, T, D)`; none before `first`."""
    group, found = len(query) // len(key), []
    for kv in range(len(key)):
        mean = np.zeros(key.shape[1] - first)
        for head in range(kv * group, (kv + 1) * group):
            weights = np.exp(key[kv, first:] @ query[head] / np.sqrt(DIM))
            mean += weights / weights.sum() / group
        found.append({first + int(j) for j in np.argsort(-mean, kind="stable")[:count]})
    return found


def read(call: tuple) -> list[set[int]]:
    """By kv head the keys that the last token of a recorded call reads, which its query heads share."""
    seen = call[1][0, :, -1]
    heads = [set(row.nonzero().flatten().tolist()) for row in seen]
    assert heads[::2] == heads[1::2]
    return heads[::2]


def of_last(call: tuple, first: int = 0) -> list[set[int]]:
    query, key = (tensor[0].numpy() for tensor in (call[0].query[:, :, -1], call[0].key))
    return most(query, key, SETTINGS["budget"], first)


def test_every_third_token_reads_all_and_says_what_the_next_two_read(calls: Recorded) -> None:
    model = patchattn.patch_model(tiny_llama(), "recycled", **SETTINGS)
    decoded(model, TOKENS[:, :18], [10, *[1] * 8])
    at = dict(zip([10, *range(11, 19)], calls, strict=True))
    for full in (10, 13, 16):
        assert read(at[full]) == [set(range(full))] * 2
        for later in (1, 2):
            since = set(range(full, full + later))
            assert read(at[full + later]) == [keys | since for keys in of_last(at[full])]
    for call, seen, output in calls:
        np.testing.assert_allclose(output.numpy(), attended(call, seen.numpy()), rtol=1e-9, atol=1e-12)


def test_the_first_token_beyond_the_budget_reads_all(calls: Recorded) -> None:
    model = patchattn.patch_model(tiny_llama(), "recycled", **SETTINGS)
    decoded(model, TOKENS[:, :7], [2, *[1] * 5])
    assert [read(call)[0] for call in calls[:4]] == [set(range(n)) for n in (2, 3, 4, 5)]
    assert read(calls[4]) == [keys | {5} for keys in of_last(calls[3])]


def test_a_choice_by_tokens_that_were_taken_back_is_not_used(calls: Recorded) -> None:
    model = patchattn.patch_model(tiny_llama(), "recycled", **SETTINGS)
    cache = DynamicCache(config=model.config)
    for part in TOKENS[:, :14].split([10, 4], dim=1):
        outputs(model, input_ids=part, **cache_argument(model, cache))
    cache.crop(-4)
    for token in TOKENS[:, 20:22].split(1, dim=1):
        outputs(model, input_ids=token, **cache_argument(model, cache))
    assert read(calls[2]) == [set(range(11))] * 2
    assert read(calls[3]) == [keys | {11} for keys in of_last(calls[2])]


def test_choices_follow_beams_and_rows_of_a_padded_batch_choose_as_alone(calls: Recorded) -> None:
    model = patchattn.patch_model(tiny_llama(), "recycled", **SETTINGS)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    tokens = torch.cat([TOKENS[:, :12], TOKENS[:, 12:]])
    cache = DynamicCache(config=model.config)
    ids = {"attention_mask": mask, "position_ids": positions(mask)}
    outputs(model, input_ids=tokens, **ids, **cache_argument(model, cache))
    cache.reorder_cache(torch.tensor([1, 0]))
    mask = torch.cat([mask.flip(0), torch.ones(2, 1, dtype=torch.long)], dim=1)
    ids = {"attention_mask": mask, "position_ids": positions(mask)[:, -1:]}
    together = outputs(model, input_ids=tokens[:, -1:], **ids, **cache_argument(model, cache))[0]
    for row, (alone, start) in enumerate([(tokens[1:, 5:], 5), (tokens[:1], 0)]):
        want = decoded(model, torch.cat([alone, tokens[row : row + 1, -1:]], dim=1), [alone.shape[1], 1])
        close(together[row : row + 1], want[:, -1:])
        shifted = [{key - start for key in keys.nonzero().flatten().tolist()} for keys in calls[1][1][row, ::2, -1]]
        assert shifted == read(calls[-1])


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """The mean over heads, of queries `(H, D)`."""
    return float(np.mean([x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(one, other, strict=True)]))


def by_drift(queries: list[np.ndarray], keys: np.ndarray, first: int, below: float) -> list[list[set[int]]]:
    """What single tokens read behind a prompt of `first`, of the last queries of calls; asked every second token."""
    noted, when, known = queries[0], first, most(queries[0], keys[:, :first], SETTINGS["budget"])
    reads = []
    for n in range(first + 1, first + len(queries)):
        since = set(range(when, n))
        if n - when < 2:
            reads.append([one | since for one in known])
        elif cosine(queries[n - first], noted) < below:
            noted, when, known = queries[n - first], n, most(queries[n - first], keys[:, :n], SETTINGS["budget"])
            reads.append([set(range(n))] * KV_HEADS)
        else:
            known, when = [one | since for one in known], n
            reads.append(known)
    return reads


def test_a_token_whose_query_is_unlike_reads_all_in_each_sequence_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = [], Recycled.attend

    def attend(self: Recycled, call: Any, inner: Any) -> Any:
        seen = []
        monkeypatch.setattr(self, "select", lambda call: seen.append(Recycled.select(self, call)) or seen[-1])
        output = original(self, call, inner)
        shape = (2, HEADS, call.query.shape[2], call.key.shape[2])
        calls.append((call, narrowed(call, seen[0]).mask.seen().expand(shape), output[0]))
        return output

    monkeypatch.setattr(Recycled, "attend", attend)
    model = patchattn.patch_model(tiny_llama(), "recycled", budget=4, every=2, similarity=0.1)
    tokens = torch.stack([7 * torch.arange(22) % 47, 11 * torch.arange(22) % 43])
    decoded(model, tokens, [10, *[1] * 12])
    kinds = set()
    for row in range(2):
        queries = [call.query[row, :, -1].numpy() for call, _, _ in calls]
        want = by_drift(queries, calls[-1][0].key[row].numpy(), 10, 0.1)
        for n, (_, seen, _) in enumerate(calls[1:]):
            got = [set(seen[row, head, 0].nonzero().flatten().tolist()) for head in range(0, HEADS, 2)]
            assert got == want[n]
        kinds.add(tuple(read == [set(range(11 + n))] * KV_HEADS for n, read in enumerate(want)))
    assert len(kinds) == 2  # they drift apart
    for call, seen, output in calls:
        np.testing.assert_allclose(output.numpy(), attended(call, seen.numpy()), rtol=1e-9, atol=1e-12)


def test_never_or_always_unlike() -> None:
    model, tokens = FAMILIES["llama"].make_exact(), text(14)
    sizes = [6, *[1] * 8]
    dense = decoded(model, tokens, sizes)
    with patchattn.patched(model, "recycled", budget=3, every=1, similarity=1.0):
        found = decoded(model, tokens, sizes)
    close(found, dense)  # each token's query is unlike any other's
    with patchattn.patched(model, "recycled", budget=3, every=2, similarity=-1.0):
        never = decoded(model, tokens, sizes)
    with patchattn.patched(model, "recycled", budget=3, every=100):
        close(never, decoded(model, tokens, sizes))
    settings = patchattn.variant_info("recycled").configure({"preset": "dynamic"})
    assert (settings.every, settings.similarity) == (5, 0.8)


def test_settings_that_hold_the_text_are_the_base_bit_for_bit() -> None:
    model, tokens = FAMILIES["llama"].make(), text(12)
    cached = decoded(model, tokens, [6, *[1] * 6])
    for settings in ({"budget": 12}, {"budget": None}, {"budget": 3, "every": 1}):
        with patchattn.patched(model, "recycled", **settings):
            assert torch.equal(decoded(model, tokens, [6, *[1] * 6]), cached)
    with patchattn.patched(model, "recycled", budget=3):
        found = decoded(model, tokens, [6, *[1] * 6])
        assert torch.equal(found[:, :6], cached[:, :6])
        assert not torch.equal(found[:, 7:], cached[:, 7:])


def test_a_static_cache_and_one_filled_without_it_are_refused() -> None:
    model, tokens = FAMILIES["llama"].make(), text(12)
    cache = DynamicCache(config=model.config)
    outputs(model, input_ids=tokens[:, :8], **cache_argument(model, cache))
    patchattn.patch_model(model, "recycled", **SETTINGS)
    with pytest.raises(ValueError, match="filled without"):
        outputs(model, input_ids=tokens[:, 8:9], **cache_argument(model, cache))
    static = StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(NotImplementedError, match="use a dynamic cache"):
        outputs(model, input_ids=tokens[:, :8], **cache_argument(model, static))
