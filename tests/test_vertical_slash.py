"""Vertical-slash heads (MInference, arXiv 2407.02490) against loops over columns and distances."""

import numpy as np
import pytest
import torch

import patchattn
from patchattn.reading.lines import ranked

from .behaviour import decoded, text
from .families import FAMILIES, outputs
from .reference import DIM, layer_in_and_out, tiny_llama
from .selecting import assert_reads, assert_texts_are_apart, projected, recorded

TOKENS = torch.arange(3, 24)[None]


def chosen(
    query: np.ndarray, key: np.ndarray, columns: int, diagonals: int, window: int, sinks: int, recent: int
) -> list[tuple[set[int], set[int]]]:
    """Columns and distances of each head, of queries `(T, H, D)` whose last is the last of the keys `(N, Hkv, D)`."""
    found, keys, group = [], len(key), query.shape[1] // key.shape[1]
    for head in range(query.shape[1]):
        by_column, by_distance = np.zeros(keys), np.zeros(keys)
        for n in range(min(window, len(query))):
            own = keys - 1 - n
            logits = np.array([query[-1 - n, head] @ key[j, head // group] for j in range(own + 1)]) / np.sqrt(DIM)
            weights = np.exp(logits - logits.max())
            for j, weight in enumerate(weights / weights.sum()):
                by_column[j] += weight
                by_distance[own - j] += weight
        by_column[:sinks], by_distance[:recent] = np.inf, np.inf
        # keys that stand for distances lie from far to near: of equal ones the first is the farthest
        from_far = np.argsort(-by_distance[::-1], kind="stable")[:diagonals]
        best = np.argsort(-by_column, kind="stable")[:columns]
        found.append(({int(j) for j in best}, {keys - 1 - int(place) for place in from_far}))
    return found


def reads(lines: tuple[set[int], set[int]], i: int, j: int, block: int) -> bool:
    start = i // block * block
    return j in lines[0] or any(0 <= j - (start - distance) < block for distance in lines[1])


@pytest.mark.parametrize(
    ("columns", "diagonals", "window", "sinks", "recent", "block"),
    [(2, 2, 3, 1, 1, 1), (3, 1, 1, 0, 1, 1), (4, 5, 30, 2, 3, 1), (2, 3, 4, 1, 2, 3), (1, 2, 2, 1, 1, 4)],
)
def test_a_prompt_reads_what_its_last_tokens_attend_to(
    columns: int, diagonals: int, window: int, sinks: int, recent: int, block: int
) -> None:
    settings = {"columns": columns, "diagonals": diagonals, "window": window, "sinks": sinks, "recent": recent}
    model = patchattn.patch_model(tiny_llama(), "vertical_slash", **settings, block=block)
    inputs, _ = layer_in_and_out(model, TOKENS)
    query, key, _ = projected(model.model.layers[0].self_attn, inputs[0])
    lines = chosen(query, key, **settings)
    assert_reads(model, TOKENS, lambda head, i, j: reads(lines[head], i, j, block))


def test_each_chunk_chooses_among_all_keys_and_single_tokens_are_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny_llama(), recorded(monkeypatch)
    settings = {"columns": 2, "diagonals": 3, "window": 4, "sinks": 1, "recent": 1}
    patchattn.patch_model(model, "vertical_slash", **settings, block=1)
    inputs, _ = layer_in_and_out(model, TOKENS)  # the only layer, so that keys do not depend on what is read
    query, key, _ = projected(model.model.layers[0].self_attn, inputs[0])
    calls.clear()
    decoded(model, TOKENS, [9, 2, 8, 1, 1])
    done = 0
    for (_, seen, _), size in zip(calls, [9, 2, 8, 1, 1], strict=True):
        lines = chosen(query[done : done + size], key[: done + size], **settings)
        for head, row in np.ndindex(4, size):
            i = done + row
            want = {j for j in range(i + 1) if size == 1 or reads(lines[head], i, j, 1)}
            assert set(seen[0, head, row].nonzero().flatten().tolist()) == want
        done += size


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("block", [1, 3])
def test_each_text_has_lines_of_its_own(side: str, block: int) -> None:
    """Beside padding on either side, of no whole block, and in packed texts."""
    model = FAMILIES["llama"].make_exact()
    settings = {"columns": 2, "diagonals": 3, "window": 3, "sinks": 1, "recent": 2, "block": block}
    patchattn.patch_model(model, "vertical_slash", **settings)
    assert_texts_are_apart(model, side)


def test_scores_are_ranked_within_their_text_and_of_equal_ones_the_first_comes_first() -> None:
    found = ranked(torch.tensor([[[1.0, 2, 2, 5, 5, 7, 5]]]), torch.tensor([[0, 0, 0, 3, 3, 3, 3]]))
    assert found.rank.flatten().tolist() == [2, 0, 1, 1, 2, 0, 3]
    assert found.running.flatten().tolist() == [5, 2, 4, 12, 17, 7, 22]


def test_lines_that_hold_the_text_are_the_base_bit_for_bit() -> None:
    model, tokens = FAMILIES["llama"].make(), text(12)
    expected, cached = outputs(model, input_ids=tokens)[0], decoded(model, tokens, [9, 1, 2])
    few = {"window": 2, "sinks": 0, "recent": 1, "block": 1}
    for settings in ({"columns": 12, "diagonals": 1}, {"columns": 1, "diagonals": 12}, {"columns": None}):
        with patchattn.patched(model, "vertical_slash", **few, **settings):
            assert torch.equal(outputs(model, input_ids=tokens)[0], expected)
            assert torch.equal(decoded(model, tokens, [9, 1, 2]), cached)
    with patchattn.patched(model, "vertical_slash", **few, columns=1, diagonals=11):
        assert not torch.equal(outputs(model, input_ids=tokens)[0][:, -1], expected[:, -1])


def test_settings_and_models_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="columns counts those of sinks among them: expected at least 30, got 20"):
        patchattn.patch_model(tiny_llama(), "vertical_slash", columns=20)
    with pytest.raises(ValueError, match="diagonals counts those of recent among them"):
        patchattn.patch_model(tiny_llama(), "vertical_slash", diagonals=99)
    with pytest.raises(NotImplementedError, match="leaves out layers with a sliding window"):
        patchattn.patch_model(FAMILIES["mistral"].make(), "vertical_slash")
    forgetful = FAMILIES["llama"].make()
    patchattn.patch_model(
        forgetful, ["streaming_llm", "vertical_slash"], {"streaming_llm": {"sinks": 1, "recent": 3, "slack": 0}}
    )
    with pytest.raises(NotImplementedError, match="lets go of some"):
        decoded(forgetful, text(14), [9, 1, 1, 1, 2])
