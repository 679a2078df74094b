"""HyperAttention (arXiv 2310.05869) against recursion and loops, and its estimate against the truth over many seeds."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import patchattn
from patchattn.reading.draws import normal, uniform

from .behaviour import close, decoded, text
from .families import FAMILIES, outputs
from .reference import DIM, HEADS, KV_HEADS, tiny_llama
from .selecting import Recorded, assert_texts_are_apart, attended, recorded

TOKENS = torch.arange(3, 48)[None]
SMALL = {"exact": 8, "block": 3, "samples": 4, "planes": 5, "seed": 1}
GROUP = HEADS // KV_HEADS


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    return recorded(monkeypatch)


def bucket(vector: np.ndarray, planes: np.ndarray) -> int:
    """Place of the signs of a vector in the Gray code, found by going through it."""
    signs = sum(1 << n for n in range(planes.shape[1]) if vector @ planes[:, n] > 0)
    return next(place for place in range(1 << planes.shape[1]) if place ^ (place >> 1) == signs)


def weights(call: Any, settings: dict[str, int], layer: int = 0) -> np.ndarray:
    """`(H, T, T)` how many keys each key stands for, of one text; 0 of those that are not read."""
    query, key = call.query[0].double().numpy(), call.key[0].double().numpy()
    heads, tokens, dim = query.shape
    planes = settings["planes"]
    axes = normal(torch.arange(dim * planes).view(dim, planes), settings["seed"], layer).numpy()
    found = np.tril(np.ones((heads, tokens, tokens)))

    def halve(start: int, end: int, level: int) -> None:
        if end - start <= settings["exact"]:
            return
        middle = start + -(-(end - start) // 2)
        halve(start, middle, level + 1)
        halve(middle, end, level + 1)
        length = middle - start
        if length < settings["exact"]:
            return
        for head in range(heads):
            number = (1 << 24) * (level + 1) + head * settings["samples"] + torch.arange(settings["samples"])
            drawn = [start + int(u * length) for u in uniform(number, settings["seed"], layer).tolist()]
            rows = sorted(range(middle, end), key=lambda i: bucket(query[head, i], axes))
            columns = sorted(range(start, middle), key=lambda j: bucket(key[head // GROUP, j], axes))
            for place, i in enumerate(rows):
                own = place * length // len(rows) // settings["block"]
                for other, j in enumerate(columns):
                    is_near = other // settings["block"] == own
                    found[head, i, j] = 1.0 if is_near else drawn.count(j) * length / settings["samples"]

    halve(0, tokens, 0)
    return found


@pytest.mark.parametrize("changes", [{}, {"exact": 5, "block": 2, "samples": 2}, {"exact": 20, "planes": 1}])
def test_halves_meet_in_blocks_and_samples(changes: dict[str, int], calls: Recorded) -> None:
    settings = {**SMALL, **changes}
    model = patchattn.patch_model(tiny_llama(), "hyper", **settings)
    outputs(model, input_ids=TOKENS)
    call, seen, output = calls[0]
    want = weights(call, settings)
    assert np.array_equal(seen[0].numpy(), want > 0)
    assert bool((want[:, -1] == 0).any())
    logs = np.log(np.where(want > 0, want, 1.0))
    given = call.replace(facts={"bias": torch.tensor(logs)[None]})
    np.testing.assert_allclose(output.numpy(), attended(given, (want > 0)[None]), rtol=1e-9, atol=1e-12)


def test_over_many_seeds_each_key_stands_for_one(calls: Recorded) -> None:
    """Sums above and below the bar of the softmax are then those of all keys: the estimate has no bias."""
    model, total = patchattn.patch_model(tiny_llama(), "hyper", **SMALL), np.zeros(())
    hyper = model.model.layers[0].self_attn.patchattn.hyper
    outputs(model, input_ids=TOKENS)
    for seed in range(60):
        hyper.config = replace(hyper.config, seed=seed)
        total = total + hyper.key_bias(calls[0][0])[0].exp().numpy() / 60
    causal = np.tril(np.ones((45, 45), dtype=bool))
    assert total[:, causal].mean() == pytest.approx(1.0, abs=0.02)
    assert np.abs(total[:, causal] - 1.0).max() < 1.5
    np.testing.assert_allclose(total[:, :8, :8], 1.0)  # a part of that length is exact


def test_texts_are_cut_by_themselves_and_tokens_that_decode_read_all(calls: Recorded) -> None:
    model = patchattn.patch_model(FAMILIES["llama"].make_exact(), "hyper", exact=3, block=1, samples=2)
    for side in ("left", "right"):
        assert_texts_are_apart(model, side)
    calls.clear()
    decoded(model, text(14), [12, 1, 1])
    assert [int(seen[0, 0, -1].sum()) for _, seen, _ in calls[-4:]] == [13, 13, 14, 14]
    assert int(calls[0][1][0, 0, -1].sum()) < 12


def test_later_chunks_of_a_prompt_are_cut_with_all_that_came_before(calls: Recorded) -> None:
    model = patchattn.patch_model(tiny_llama(), "hyper", **SMALL)
    decoded(model, TOKENS, [15, 30])
    (call, seen, _) = calls[-1]
    axes = normal(torch.arange(DIM * 5).view(DIM, 5), 1, 0).numpy()
    query, key = call.query[0].numpy(), call.key[0].numpy()
    rows = sorted(range(23, 45), key=lambda i: bucket(query[0, i - 15], axes))
    columns = sorted(range(23), key=lambda j: bucket(key[0, j], axes))
    for place, i in enumerate(rows):
        own = place * 23 // 22 // 3
        near = {j for other, j in enumerate(columns) if other // 3 == own}
        read = set(seen[0, 0, i - 15, :23].nonzero().flatten().tolist())
        assert near <= read
        assert len(read - near) <= SMALL["samples"]


def test_short_texts_are_the_base_bit_for_bit() -> None:
    model, tokens = FAMILIES["llama"].make(), text(12)
    expected = outputs(model, input_ids=tokens)[0]
    for exact in (12, 7, None):  # halves of six are shorter than seven
        with patchattn.patched(model, "hyper", exact=exact, block=1, samples=1):
            assert torch.equal(outputs(model, input_ids=tokens)[0], expected)
    with patchattn.patched(model, "hyper", exact=4, block=1, samples=1):
        assert not torch.equal(outputs(model, input_ids=tokens)[0], expected)


def test_draws_are_normal_and_alike_in_every_call() -> None:
    numbers = normal(torch.arange(20000), 3, 1)
    assert abs(float(numbers.mean())) < 0.03
    assert float(numbers.std()) == pytest.approx(1.0, abs=0.02)
    assert float((numbers.abs() < 1.0).double().mean()) == pytest.approx(0.6827, abs=0.01)
    model = patchattn.patch_model(tiny_llama(), "hyper", **SMALL)
    close(*(outputs(model, input_ids=TOKENS)[0] for _ in range(2)))
