"""Parts of benchmarks/heads.py about roles of heads: what is silenced, what is drawn, and what the pages say."""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from .long_context import BYTES_CHAT, tiny_llama

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
importlib.import_module("heads")
sys.path.pop(0)
common, codes, dates, directions, maps, memory, places = (
    sys.modules[f"heads_parts.{name}"]
    for name in ("common", "codes", "dates", "directions", "maps", "memory", "places")
)
LAYERS, HEADS, DIM = 2, 8, 4


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    text = tmp_path / "text.txt"
    text.write_text("A sentence of a text. Another one, 2 of 3. " * 40)
    for part, name, value in (
        (places, "WINDOW", 32),
        (places, "COPIED", 8),
        (places, "COUNT", 1),
        (dates, "COUNT", 1),
        (dates, "FOUND", 3),
        (maps, "COUNT", 1),
        (codes, "COUNTS", (1, 2)),
        (codes, "PROMPTS", 2),
        (codes, "SEEDS", 2),
        (directions, "ATTENDED", 0.05),
        (directions, "WRITERS", 1),
        (directions, "PAIRS", 2),
        (directions, "TOKENS", 12),
        (directions, "APART", 7),
    ):
        monkeypatch.setattr(part, name, value)
    model = tiny_llama(
        num_hidden_layers=LAYERS, max_position_embeddings=1024, num_attention_heads=HEADS, hidden_size=HEADS * DIM
    )
    return common.Setup(model, BYTES_CHAT, text, tmp_path / "rows", 4)


def do(setup: Any, part: Any, *keys: str) -> list[dict[str, Any]]:
    jobs = dict(part.jobs(setup))
    for key in keys:
        setup.write(part.NAME, key, jobs[key]())
    return [setup.rows(part.NAME)[key] for key in keys]


def test_silent_heads_write_nothing(setup: Any) -> None:
    tokens, heads = [5, 9, 60, 7, 30, 31], [(0, 2), (1, 0)]
    handles = []
    for layer, head in heads:

        def zero(module: Any, args: Any, head: int = head) -> tuple[torch.Tensor, ...]:
            states = args[0].clone().unflatten(-1, (HEADS, -1))
            states[:, :, head] = 0
            return (states.flatten(-2),)

        handles.append(setup.model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(zero))
    with torch.no_grad():
        shares = setup.model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    for handle in handles:
        handle.remove()
    want = [-float(shares[place, token]) for place, token in enumerate(tokens[1:])]
    with common.silent(setup, heads):
        np.testing.assert_allclose(common.losses(setup, tokens), want, atol=1e-5)
    plain = common.losses(setup, tokens)
    assert not np.allclose(plain, want, atol=1e-3)
    with common.silent(setup, []):
        np.testing.assert_array_equal(common.losses(setup, tokens), plain)


def test_heads_are_ranked_and_drawn_from_the_others() -> None:
    scores = np.array([[0.1, 0.9, 0.3], [0.9, 0.2, 0.0]])
    assert common.best(scores, 3) == [(0, 1), (1, 0), (0, 2)]
    without = {(0, 1), (1, 0)}
    every = {place for seed in range(20) for place in common.drawn((2, 3), without, 2, (seed,))}
    assert every == {(0, 0), (0, 2), (1, 1), (1, 2)}
    assert common.drawn((2, 3), without, 2, (1,)) == common.drawn((2, 3), without, 2, (1,))


def test_heads_of_places_and_memory(setup: Any) -> None:
    *found, one, other = do(setup, places, "heads/0", "heads/1", "without/0", "without/1")
    lists = places.chosen(setup, 0)
    assert lists["before"] == common.best(found[0]["before"], 1)  # those of the first half of the texts
    assert lists["random"][0] not in [*common.best(found[0]["before"], 2), *common.best(found[0]["rare"], 2)]
    text = common.windows(setup, 32)[2]
    with common.silent(setup, lists["before"]):
        assert one["found"]["before"][0] == pytest.approx(float(common.losses(setup, text).mean()), abs=1e-4)
    values = [row["found"]["before"][1] - row["found"]["random"][1] for row in (one, other)]
    page = "\n".join(places.section(setup, None))
    assert f"({np.mean(values):+.2f} nats a token, standard error {stats.sem(values):.2f})" in page
    (row,) = do(setup, memory, "Genesis")
    assert 0 <= row["right"] <= 1
    assert len(row["gradients"]) == LAYERS


def test_groups_that_are_no_pairs(setup: Any) -> None:
    some, others = [1.0, 2.5, 3.0], [0.5, 0.25, 1.0, 0.1]
    size, error = memory.apart(some, others)
    welch = stats.ttest_ind(some, others, equal_var=False)
    assert size / error == pytest.approx(welch.statistic)
    assert memory.low_share({"gradients": [1.0, 2.0, 3.0, 2.0]}) == pytest.approx(37.5)
    for number, name in enumerate(["Genesis", "Hamlet", "Psalm 23", "text 0"]):
        found = {"dense": 1.0, "rare": 1.5 + number, "random": 1.2}
        row = {"right": 0.9 if number in (0, 1, 3) else 0.1, "gradients": [2.0 + number, 1.0], "found": found}
        setup.write("memory", name, row)
    page = "\n".join(memory.section(setup, None))
    assert "2 (Genesis, Hamlet)" in page  # a text of the file is none that is quoted
    assert "| known by heart | 2 | 1.00 | 70.8 ± 4.2 | +1.00 ± 0.50 | +0.20 ± 0.00 |" in page


def test_dated_prompts(setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    every = dates.prompts()
    assert len({one[0] for one in every}) == len(every) > 30
    assert all(dated.startswith("In ") and dated[10:] == plain[1:] for dated, plain, _ in every)
    monkeypatch.setattr(dates, "prompts", lambda: every[:6])
    scores, one, _ = do(setup, dates, "heads", "without/0", "without/1")
    assert np.shape(scores["scores"]) == (LAYERS, HEADS)
    text, answer = every[3][0], every[3][2]
    ids = BYTES_CHAT(text + answer[0], add_special_tokens=False)["input_ids"]
    assert one["found"]["dense"][0] == pytest.approx(float(common.losses(setup, ids)[-1]), abs=1e-4)
    assert sum(line.startswith("- ") for line in dates.section(setup, None)) == 3


def test_relations_between_single_tokens(setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Words:
        """Words of a list are single tokens, others two."""

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            word = text.strip()
            return {"input_ids": [3 + "abcdefgh".index(word)] if word in tuple("abcdefgh") else [20, 21]}

    setup.tokenizer = Words()
    monkeypatch.setattr(maps, "_RELATIONS", {"next": ("After{} is", "a:b c:d e:f g:h a:no")})
    split = maps.halves(setup, "next")
    assert sorted(split["found"] + split["other"]) == [(3, 4), (5, 6), (7, 8), (9, 10)]
    assert [source for source, _ in split["wrong"]] == [source for source, _ in split["other"]]
    assert not set(split["wrong"]) & set(split["other"])
    do(setup, maps, "next/found", "next/other", "next/wrong", "next/without/0", "next/without/1")
    assert sum(line.startswith("- next") for line in maps.section(setup, None)) == 2


def test_pairs_that_are_attended(setup: Any) -> None:
    rows = do(setup, directions, "0", "1")
    pairs = [pair for row in rows for pair in row["pairs"]]
    assert len(pairs) >= 2
    for pair in pairs:
        assert 1 <= pair["used"] <= pair["of"]
        assert pair["attention"] > 0.05
        assert pair["left"]["writers"] != pair["attention"]  # something was silenced
    page = "\n".join(directions.section(setup, None))
    assert f"takes {np.mean([pair['used'] for pair in pairs]):.1f} ± " in page


def test_who_gets_something(setup: Any) -> None:
    for seed in range(20):
        text, without, getter, giver = codes.sentence(seed)
        assert (text.count(getter), text.count(giver), without.count(giver)) == (1, 2, 1)
    heads, _, *rows = do(setup, codes, "heads/0", "heads/1", "without/0", "without/1")
    assert np.shape(heads["scores"]) == (LAYERS, HEADS)
    values = [row["found"]["best 2"] - row["found"]["random 2"] for row in rows]
    page = "\n".join(codes.section(setup, None))
    assert f"({np.mean(values):+.2f} nats, standard error {stats.sem(values):.2f})" in page
