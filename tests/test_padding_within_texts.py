"""Prompts padded on the right that go on: padding stands within a text, which comes out as it does alone."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import patchattn
from patchattn.core.kv_caches import cache_argument

from .behaviour import Case, accepted, close, positions, text
from .families import FAMILIES, outputs

PROMPT, LENGTHS = 14, (14, 10, 12)  # gaps are whole pages of two keys
SIZES = [1, 1, 3, 1]  # of the calls behind the prompt
# What chooses keys by the last query of a call, and says so.
REFUSED = {"adakv", "keydiff", "knorm", "pyramidkv", "snapkv", "think", "tova"}
PAGED = {"budget": 6, "page": 2}
MORE: list[tuple[str, dict[str, Any]]] = [
    ("flex_prefill", {"gamma": 0.6, "tau": 0.0, "block": 2, "budget": 2}),
    ("flex_prefill", {"gamma": 0.6, "tau": 0.3, "block": 2, "budget": 4}),
    ("vertical_slash", {"columns": 3, "diagonals": 4, "window": 2, "sinks": 1, "recent": 2, "block": 3}),
    ("hip", {**PAGED, "queries": 2, "dense_layers": 0}),
    ("longheads", {"window": 6, "chunk": 2}),
    ("lserve", {**PAGED, "logical": 2, "refresh": 2, "prefill": "selected"}),
    ("moba", {"block": 2, "top_k": 3, "decode": "selected"}),
    ("nosa", {"block": 2, "aware": 4, "top_k": 5, "local": 3, "first": 1, "length": 2, "stride": 2}),
    ("nsa", {"block": 2, "top_k": 5, "local": 3, "first": 1, "length": 2, "stride": 2}),
    ("power", {"block": 1, "local": 2}),
    ("quest", {**PAGED, "dense_layers": 0, "prefill": "selected"}),
    ("quest", {**PAGED, "dense_layers": 0, "heads": "query"}),
    ("recycled", {"budget": 5, "every": 2}),
    ("recycled", {"budget": 5, "every": 2, "similarity": 0.5}),
    ("triangle", {"sinks": 1, "recent": 2, "last": 3}),
    ("twilight", {**PAGED, "dense_layers": 0, "top_p": 0.7}),
    ("xattention", {"block": 2, "stride": 1, "threshold": 0.5}),
]
CASES = [*accepted("llama", "attention", "cache", "surgery"), *(Case(name, tuple(some.items())) for name, some in MORE)]


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Texts and their mask."""
    tokens = text(PROMPT + 6, rows=len(LENGTHS))
    mask = torch.ones_like(tokens)
    for row, length in enumerate(LENGTHS):
        mask[row, length:PROMPT] = 0
    return tokens, mask


def fed_in(model: Any, tokens: torch.Tensor, mask: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Outputs of calls of these sizes on one kv cache."""
    cache, found, done = DynamicCache(config=model.config), [], 0
    for size in sizes:
        part = slice(done, done + size)
        done += size
        given = {"attention_mask": mask[:, :done], "position_ids": positions(mask)[:, part]}
        found.append(outputs(model, input_ids=tokens[:, part], **given, **cache_argument(model, cache))[0])
    return torch.cat(found, dim=1)


def assert_as_alone(model: Any, tokens: torch.Tensor, mask: torch.Tensor) -> None:
    together = fed_in(model, tokens, mask, [PROMPT, *SIZES])
    for row, length in enumerate(LENGTHS):
        real, own = mask[row].bool(), slice(row, row + 1)
        close(together[own, real], fed_in(model, tokens[own, real], mask[own, real], [length, *SIZES]))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_texts_that_go_on_behind_padding_come_out_as_alone(case: Case) -> None:
    model = case.patch(FAMILIES["llama"].make_exact())
    if case.variant in REFUSED and ("recent", 0) not in case.settings:
        with pytest.raises(NotImplementedError, match="pad"):
            assert_as_alone(model, *padded())
    else:
        assert_as_alone(model, *padded())


def test_a_landmark_that_pads_ends_no_section() -> None:
    model, (tokens, mask) = FAMILIES["llama"].make_exact(), padded()
    patchattn.patch_model(model, "landmark", token=5, top=1)
    tokens = tokens.masked_fill(tokens == 5, 6).masked_fill(mask == 0, 5)
    tokens[:, 3] = 5
    assert_as_alone(model, tokens, mask)
