"""Ranking by importance against taking away one head after the other; files of scores, whole and broken."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchattn.core.heads import BaseFacts
from patchattn.core.importance import HeadImportance, SiteScores
from patchattn.inspection.head_importance import head_importance

from .families import FAMILIES

SITES = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 3)).flatmap(
        lambda shape: st.tuples(
            st.just(shape[0]),
            st.lists(st.sampled_from([0.0, 0.1, 0.5, 2.0]), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]),
        )
    ),
    min_size=1,
    max_size=4,
)


def importance(sites: list[tuple[int, list[float]]]) -> HeadImportance:
    scores = {f"layer{i}": SiteScores(i, kv_heads, tuple(s)) for i, (kv_heads, s) in enumerate(sites)}
    return HeadImportance(scores, "michel", BaseFacts("llama", len(sites), len(sites[0][1])))


@given(SITES, st.integers(0, 12), st.booleans(), st.sampled_from(["global", "layer"]))
def test_the_lowest_heads(sites: Any, count: int, keep_one: bool, scope: Any) -> None:
    scored = importance(sites)
    together = [list(scored.scores)] if scope == "global" else [[name] for name in scored.scores]
    most = [sum(len(scored.scores[name]) - keep_one for name in names) for names in together]
    if count > min(most):
        with pytest.raises(ValueError, match="remove fewer"):
            scored.lowest(count=count, scope=scope, keep_one_per_layer=keep_one)
        return
    removed = scored.lowest(count=count, scope=scope, keep_one_per_layer=keep_one)
    for names in together:
        left = {name: list(range(len(scored.scores[name]))) for name in names}
        for _ in range(count):  # the lowest one that may go, again and again
            may_go = [
                (scored.scores[name][head], names.index(name), head)
                for name, heads in left.items()
                for head in heads
                if len(heads) > keep_one
            ]
            _, layer, head = min(may_go)
            left[names[layer]].remove(head)
        for name, heads in left.items():
            assert sorted([*heads, *removed.get(name, ())]) == list(range(len(scored.scores[name])))


@given(SITES, st.floats(0, 1), st.sampled_from(["global", "layer"]))
def test_whole_groups(sites: Any, sparsity: float, scope: Any) -> None:
    scored = importance(sites)
    removed = scored.lowest(sparsity=sparsity, groups=True, scope=scope, keep_one_per_layer=False)
    total = sum(len(scores) for scores in scored.scores.values())
    assert sum(map(len, removed.values())) <= sparsity * total + 1e-9
    for name, heads in removed.items():
        size = len(scored.scores[name]) // scored.sites[name].kv_heads
        assert set(heads) == {g * size + i for g in {head // size for head in heads} for i in range(size)}


def test_shares_and_groups_by_example() -> None:
    scored = importance([(2, [1.0, 2.0, 0.5, 4.0]), (1, [0.1, 0.3])])
    assert scored.lowest(sparsity=0.5) == {"layer0": (0, 2), "layer1": (0,)}
    assert scored.lowest(count=2, groups=True) == {"layer0": (0, 1)}
    assert scored.lowest(count=1, scope="layer") == {"layer0": (2,), "layer1": (0,)}
    assert scored.lowest(count=2, keep_one_per_layer=False) == {"layer1": (0, 1)}
    assert scored.lowest(sparsity=0.0) == {}
    uneven = HeadImportance({"a": SiteScores(0, 2, (1.0, 2.0, 3.0))}, "michel", scored.base)
    assert uneven.lowest(count=1) == {"a": (0,)}
    with pytest.raises(ValueError, match="groups=False"):
        uneven.lowest(count=1, groups=True)
    assert importance([(1, [float(i) for i in range(100)])]).lowest(sparsity=0.29)["layer0"] == tuple(range(29))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "either sparsity or count"),
        ({"sparsity": 0.5, "count": 1}, "either sparsity or count"),
        ({"sparsity": 1.5}, "0 to 1"),
        ({"count": -1}, "at least 0"),
        ({"count": True}, "at least 0"),
        ({"count": 1, "scope": "model"}, "scope"),
        ({"sparsity": 1.0}, "remove fewer"),
    ],
    ids=str,
)
def test_ranking_mistakes(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        importance([(2, [1.0, 2.0])]).lowest(**how)


def test_a_file_of_scores(tmp_path: Path) -> None:
    model, path = FAMILIES["llama"].make(), tmp_path / "importance.json"
    found = head_importance(model, [FAMILIES["llama"].inputs()])
    found.save(path)
    assert HeadImportance.load(path) == found
    found.check(model)
    assert json.loads(path.read_text())["base"] == {"model_type": "llama", "layers": 2, "heads": 4, "name": None}
    with pytest.raises(ValueError, match="does not have"):
        found.check(FAMILIES["gpt2"].make())
    site = found.sites["model.layers.0.self_attn"]
    fewer = {"model.layers.0.self_attn": SiteScores(0, site.kv_heads, site.scores[:2])}
    with pytest.raises(ValueError, match="Score this model anew"):
        HeadImportance(fewer, "michel", found.base).check(model)


def broken_files() -> Iterator[Any]:
    good = {"name": "a", "layer": 0, "kv_heads": 1, "scores": [1.0]}
    whole = {
        "format": "patchattn head importance 1",
        "method": "flap",
        "settings": {},
        "base": {"model_type": "llama", "layers": 1, "heads": 1},
        "tokens": 3,
        "sites": [good],
    }
    yield "{", "not valid JSON"
    yield json.dumps([1]), "expected an object"
    yield json.dumps({**whole, "format": "other"}), "expected an object"
    yield json.dumps({**whole, "extra": 1}), "has the fields"
    yield json.dumps({**whole, "tokens": "3"}), "tokens of an importance must be int"
    yield json.dumps({**whole, "sites": []}), "at least one"
    yield json.dumps({**whole, "sites": [good, good]}), "twice"
    yield json.dumps({**whole, "sites": [{**good, "scores": ["high"]}]}), "expected numbers"
    yield json.dumps({**whole, "sites": [{**good, "scores": [math.nan]}]}), "finite"
    yield json.dumps({**whole, "sites": [{**good, "kv_heads": 2}]}), "kv heads"
    yield json.dumps({**whole, "base": {"model_type": "llama"}}), "base"


@pytest.mark.parametrize(("text", "message"), list(broken_files()))
def test_broken_files(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "importance.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        HeadImportance.load(path)
    assert str(path) in str(error.value)
    with pytest.raises(ValueError, match="no importance file"):
        HeadImportance.load(tmp_path / "nowhere.json")
