"""FlexPrefill (arXiv 2502.20766) against loops over blocks, tokens and distances."""

import numpy as np
import pytest
import torch

import patchattn

from .behaviour import decoded, text
from .families import FAMILIES, outputs
from .reference import DIM, layer_in_and_out, tiny_llama
from .selecting import assert_reads, assert_texts_are_apart, projected, recorded

TOKENS = torch.arange(3, 28)[None]


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def blocks_of(line: np.ndarray, gamma: float, block: int, budget: int) -> int:
    """How many blocks a line of tokens asks for."""
    total, tokens = 0.0, 0
    for weight in sorted(line, reverse=True):
        tokens += 1
        total += weight
        if total > gamma * line.sum():
            break
    return max(tokens // block + 1, -(-budget // block))


def best(mass: np.ndarray, forced: int, count: int) -> set[int]:
    mass = mass.copy()
    mass[forced] = np.inf
    return {int(number) for number in np.argsort(-mass, kind="stable")[:count]}


def read_by(
    query: np.ndarray, key: np.ndarray, gamma: float, tau: float, block: int, budget: int
) -> list[dict[int, set[int]]]:
    """Of each head, the blocks of keys that blocks of queries read, by number; and whether it is query-aware, at -1.

    Args:
        query: `(T, H, D)`, the last of which is the last of the keys.
        key: `(N, Hkv, D)`.
        gamma, tau, block, budget: as the settings.
    """
    keys, group, found = len(key), query.shape[1] // key.shape[1], []
    start, count = keys - len(query), -(-keys // block)
    last_rows = range(max(start, keys - block), keys)
    for head in range(query.shape[1]):
        own_keys = key[:, head // group]
        means = np.array([own_keys[b * block : (b + 1) * block].mean(axis=0) for b in range(count)])
        columns, distances = np.zeros(keys), np.zeros(keys)
        for i in last_rows:
            for j, weight in enumerate(softmax(own_keys[: i + 1] @ query[i - start, head] / np.sqrt(DIM))):
                columns[j] += weight
                distances[i - j] += weight
        from_far = distances[::-1]
        in_blocks = [np.add.reduceat(line, range(0, keys, block)) for line in (columns, from_far)]
        mean_last = np.mean([query[i - start, head] for i in last_rows], axis=0)
        estimated, true = softmax(means @ mean_last / np.sqrt(DIM)), in_blocks[0] / in_blocks[0].sum()
        middle = (estimated + true) / 2
        divergence = sum(part @ np.log(np.where(part > 0, part / middle, 1.0)) / 2 for part in (estimated, true))
        is_aware = np.sqrt(max(divergence, 0.0)) < tau
        numbers = [1 if is_aware else blocks_of(line, gamma, block, 1) for line in (columns, from_far)]
        numbers = [max(number, -(-budget // block)) for number in numbers]
        vertical = best(in_blocks[0], 0, numbers[0])
        slashes = {count - 1 - place for place in best(in_blocks[1], count - 1, numbers[1])}
        rows = range(start // block, count)
        reads = {a: {b for b in range(a + 1) if b in vertical or a - b in slashes} for a in rows}
        if is_aware:
            entries = []
            for a in rows:
                of_row = [query[i - start, head] for i in range(max(start, a * block), min(keys, (a + 1) * block))]
                weights = softmax(means[: a + 1] @ np.mean(of_row, axis=0) / np.sqrt(DIM))
                entries += [(-weight, a, b) for b, weight in enumerate(weights)]
            total = 0.0
            for weight, a, b in sorted(entries):
                total -= weight
                if total > gamma * len(rows):
                    break
                reads[a].add(b)
        found.append({**reads, -1: {int(is_aware)}})
    return found


CASES = [
    (0.5, 0.0, 1, 1),
    (0.5, 1.0, 1, 1),
    (0.6, 0.0, 3, 3),
    (0.6, 1.0, 4, 4),
    (0.3, 0.1, 2, 2),
    (0.2, 0.0, 3, 7),
]


@pytest.mark.parametrize(("gamma", "tau", "block", "budget"), CASES)
def test_a_prompt_reads_lines_or_the_best_blocks(gamma: float, tau: float, block: int, budget: int) -> None:
    settings = {"gamma": gamma, "tau": tau, "block": block, "budget": budget}
    model = patchattn.patch_model(tiny_llama(), "flex_prefill", **settings)
    inputs, _ = layer_in_and_out(model, TOKENS)
    query, key, _ = projected(model.model.layers[0].self_attn, inputs[0])
    read = read_by(query, key, **settings)
    aware = {next(iter(of_head[-1])) for of_head in read}
    assert aware == ({0} if tau == 0 else {1} if tau == 1 else {0, 1})
    assert_reads(model, TOKENS, lambda head, i, j: j // block in read[head][i // block])


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_each_chunk_chooses_by_its_own_rows_and_single_tokens_are_dense(
    tau: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks that begin inside of a block."""
    model, calls = tiny_llama(), recorded(monkeypatch)
    settings = {"gamma": 0.4, "tau": tau, "block": 2, "budget": 2}
    patchattn.patch_model(model, "flex_prefill", **settings)
    inputs, _ = layer_in_and_out(model, TOKENS)
    query, key, _ = projected(model.model.layers[0].self_attn, inputs[0])
    calls.clear()
    decoded(model, TOKENS, [9, 5, 8, 1, 2])
    done = 0
    for (_, seen, _), size in zip(calls, [9, 5, 8, 1, 2], strict=True):
        read = read_by(query[done : done + size], key[: done + size], **settings)
        for head, row in np.ndindex(4, size):
            i = done + row
            want = {j for j in range(i + 1) if size == 1 or j // 2 in read[head][i // 2]}
            assert set(seen[0, head, row].nonzero().flatten().tolist()) == want
        done += size


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_each_text_has_blocks_of_its_own(side: str, tau: float) -> None:
    """Beside padding on either side, of no whole block, and in packed texts."""
    model = FAMILIES["llama"].make_exact()
    patchattn.patch_model(model, "flex_prefill", gamma=0.4, tau=tau, block=3, budget=3)
    assert_texts_are_apart(model, side)


def test_all_the_weights_or_a_budget_that_holds_the_text_are_the_base_bit_for_bit() -> None:
    model, tokens = FAMILIES["llama"].make(), text(12)
    expected, cached = outputs(model, input_ids=tokens)[0], decoded(model, tokens, [9, 1, 2])
    for settings in ({"gamma": 1.0, "budget": 1}, {"gamma": 0.1, "budget": 12}):
        with patchattn.patched(model, "flex_prefill", block=2, **settings):
            assert torch.equal(outputs(model, input_ids=tokens)[0], expected)
            assert torch.equal(decoded(model, tokens, [9, 1, 2]), cached)
    with patchattn.patched(model, "flex_prefill", block=2, gamma=0.0, budget=2, tau=0.0):
        assert not torch.equal(outputs(model, input_ids=tokens)[0][:, -1], expected[:, -1])


def test_settings_and_models_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="gamma must lie between"):
        patchattn.patch_model(tiny_llama(), "flex_prefill", gamma=1.5)
    with pytest.raises(NotImplementedError, match="leaves out layers with a sliding window"):
        patchattn.patch_model(FAMILIES["mistral"].make(), "flex_prefill")
    forgetful = FAMILIES["llama"].make()
    settings = {"streaming_llm": {"sinks": 1, "recent": 3, "slack": 0}, "flex_prefill": {"block": 1, "budget": 1}}
    patchattn.patch_model(forgetful, ["streaming_llm", "flex_prefill"], settings)
    with pytest.raises(NotImplementedError, match="lets go of some"):
        decoded(forgetful, text(14), [9, 1, 1, 1, 2])
