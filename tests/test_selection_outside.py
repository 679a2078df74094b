"""Variants that come after a selection: they find what it leaves, as if the model had hidden the rest."""

from typing import Any

import pytest
import torch

import patchattn

from .behaviour import close, decoded, randomise, text
from .families import FAMILIES
from .selecting import Recorded, recorded
from .test_calls import toy

ALL: dict[str, Any] = {"prefill": "selected", "dense_layers": 0}
# by what `select` gives: places, a mask for single tokens, sinks and recent keys, blocks, a split
SELECTIONS: dict[str, dict[str, Any]] = {
    "quest": {"budget": 4, "page": 2, **ALL},
    "hip": {"budget": 4, "page": 2, "dense_layers": 0, "queries": 1},
    "recycled": {"budget": 3, "every": 2},
    "streaming": {"sinks": 1, "recent": 3},
    "power": {"block": 1, "local": 1},
    "triangle": {"last": 1, "sinks": 1, "recent": 2, "dense_layers": 0},
}
OTHERS: dict[str, dict[str, Any]] = {
    "moh": {"active_ratio": 0.5},
    "ssa": {"value": False},
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    return recorded(monkeypatch)


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", SELECTIONS)
def test_what_is_left_is_all_there_is(name: str, other: str, calls: Recorded) -> None:
    model, tokens, sizes = FAMILIES["llama"].make_exact(), text(12), [8, 1, 1, 2]
    with patchattn.patched(model, [name, other], {name: SELECTIONS[name], other: OTHERS[other]}):
        randomise(model)
        found = decoded(model, tokens, sizes)
    left = iter([seen for _, seen, _ in calls])
    assert any(not torch.equal(seen, call.mask.seen().expand_as(seen)) for call, seen, _ in calls)
    with (
        toy(lambda call, inner: inner(call.seeing(next(left)))) as hiding,
        patchattn.patched(model, [hiding, other], {other: OTHERS[other]}),
    ):
        randomise(model)
        close(found, decoded(model, tokens, sizes))
    with patchattn.patched(model, name, SELECTIONS[name]):
        assert not torch.allclose(found, decoded(model, tokens, sizes), atol=1e-4)
