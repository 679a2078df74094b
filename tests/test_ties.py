"""Where all keys score alike: of equal ones every selector chooses the first, or what its page says.

Those whose choice is not of pages are compared with their own loops, which sort stably.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import patchattn

from . import test_flex_prefill, test_hip, test_vertical_slash
from .behaviour import decoded
from .reference import HEADS, layer_in_and_out, tiny_llama
from .selecting import assert_reads, projected, recorded, scoring_alike

LENGTH = 21
TOKENS = torch.arange(3, 3 + LENGTH)[None]
Reads = Callable[[int, int], bool]
PAGES: dict[str, Any] = {"budget": 6, "page": 2}
ALL: dict[str, Any] = {"prefill": "selected", "dense_layers": 0}


def first_pages(page: int, count: int, local: int = 1) -> Reads:
    """Token i reads `count` pages: the last `local` ones, its own among them, and the first ones."""

    def reads(i: int, j: int) -> bool:
        return j // page < count - local or j // page > i // page - local

    return reads


CASES: dict[str, tuple[str, dict[str, Any], Reads]] = {
    "quest": ("quest", {**PAGES, **ALL}, first_pages(2, 3)),
    "quest, query heads": ("quest", {**PAGES, **ALL, "heads": "query"}, first_pages(2, 3)),
    "lserve": ("lserve", {**PAGES, "logical": 1, "refresh": 1, "prefill": "selected"}, first_pages(2, 3)),
    "twilight": ("twilight", {**PAGES, **ALL, "top_p": 0.2}, first_pages(2, 3)),  # equal weights stay together
    "twilight of all": ("twilight", {**ALL, "budget": None, "top_p": 0.2}, lambda i, j: True),
    "moba": ("moba", {"block": 3, "top_k": 3, "decode": "selected"}, first_pages(3, 3)),
    "nsa": ("nsa", {"block": 2, "top_k": 4, "local": 1, "first": 0, "length": 1, "stride": 1}, first_pages(2, 4)),
    "nosa": (
        "nosa",  # by queries the first ones, then by values the next ones
        {"block": 2, "aware": 3, "top_k": 5, "local": 2, "first": 0, "length": 1, "stride": 1},
        first_pages(2, 5, local=2),
    ),
    "dma": ("dma", {"window": 4}, lambda i, j: i - j < 4),  # the last ones, as an untrained model should
    "xattention": ("xattention", {"block": 2, "stride": 1, "threshold": 0.0}, lambda i, j: j < 2 or j // 2 == i // 2),
}


@pytest.mark.parametrize("name", CASES)
def test_of_equal_scores_the_first_are_chosen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variant, settings, reads = CASES[name]
    model, calls = scoring_alike(tiny_llama()), recorded(monkeypatch)
    patchattn.patch_model(model, variant, settings)
    sizes = [LENGTH] if patchattn.variant_info(variant).looks_ahead else [LENGTH - 2, 1, 1]
    decoded(model, TOKENS, sizes)
    i = 0
    for _, seen, _ in calls:
        for row in range(seen.shape[2]):
            want = [j for j in range(i + 1) if reads(i, j)]
            for head in range(HEADS):
                assert seen[0, head, row].nonzero().flatten().tolist() == want
            i += 1
    assert i == LENGTH


def test_keys_that_are_recycled_are_the_first_of_equal_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = scoring_alike(tiny_llama()), recorded(monkeypatch)
    patchattn.patch_model(model, "recycled", budget=4, every=3)
    decoded(model, TOKENS, [18, 1, 1, 1])
    read = [seen[0, :, -1] for _, seen, _ in calls]
    for step, keys in enumerate(read[1:3], 1):
        for of_head in keys:
            assert of_head.nonzero().flatten().tolist() == [0, 1, 2, 3, *range(18, 18 + step)]


@pytest.mark.parametrize("block", [1, 3])
def test_columns_and_diagonals(block: int) -> None:
    """Of columns the first, of diagonals the farthest."""
    settings = {"columns": 4, "diagonals": 5, "window": 3, "sinks": 1, "recent": 2}
    model = patchattn.patch_model(scoring_alike(tiny_llama()), "vertical_slash", **settings, block=block)
    inputs, _ = layer_in_and_out(model, TOKENS)
    query, key, _ = projected(model.model.layers[0].self_attn, inputs[0])
    lines = test_vertical_slash.chosen(query, key, **settings)
    assert_reads(model, TOKENS, lambda head, i, j: test_vertical_slash.reads(lines[head], i, j, block))


@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize("block", [1, 3])
def test_blocks_of_columns_and_diagonals_and_the_best_blocks(block: int, tau: float) -> None:
    settings = {"gamma": 0.3, "tau": tau, "block": block, "budget": block}
    model = patchattn.patch_model(scoring_alike(tiny_llama()), "flex_prefill", **settings)
    inputs, _ = layer_in_and_out(model, TOKENS)
    query, key, _ = projected(model.model.layers[0].self_attn, inputs[0])
    read = test_flex_prefill.read_by(query, key, **settings)
    assert_reads(model, TOKENS, lambda head, i, j: j // block in read[head][i // block])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_sum_up_to_just_the_share_are_read(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys score about alike: the first half of the rows reads all, the others the first key and their own.

    The sum of the first half is half of all, however it is rounded.
    """
    model, calls = tiny_llama().to(dtype), recorded(monkeypatch)
    model.model.layers[0].self_attn.q_proj.weight.data.mul_(1e-3)
    patchattn.patch_model(model, "flex_prefill", gamma=0.5, tau=1.0, block=1, budget=1)
    for length in range(8, 46, 2):
        calls.clear()
        model(torch.arange(3, 3 + length)[None])
        number = torch.arange(length)
        reads = (number[:, None] < length // 2) | (number == 0) | (number == number[:, None])
        assert torch.equal(calls[0][1][0], (reads & (number <= number[:, None])).expand(HEADS, -1, -1)), length


@pytest.mark.parametrize("heads", ["kv", "query"])
@pytest.mark.parametrize("page", [1, 2])
def test_parts_of_a_tree(page: int, heads: str) -> None:
    settings = {"budget": 6, "page": page, "heads": heads}
    model = patchattn.patch_model(scoring_alike(tiny_llama()), "hip", **settings, dense_layers=0, queries=1)
    inputs, _ = layer_in_and_out(model, TOKENS)
    query, key, _ = projected(model.model.layers[0].self_attn, inputs[0])
    read = test_hip.by_loops(query, key, **settings)
    assert_reads(model, TOKENS, lambda head, i, j: j // page in read[i][head])
