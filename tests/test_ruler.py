"""RULER's tasks: what is hidden, that it can be found by reading, and scores."""

import json
import re
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from patchattn.evaluation.tasks.ruler import RULER_TASKS, NiahMultikey, NiahMultivalue, NiahSingle, VariableTracking

from .long_context import BYTES, BYTES_CHAT, Reader, tiny_llama

NEEDLE = r"One of the access codes of (\S+) is (\S+)\."
WORDS, NUMBER = r"[a-z]+-[a-z]+", r"[1-9]\d{6}"


def text_of(task: Any, index: int) -> str:
    return BYTES.decode(task.prompt(BYTES, index).tokens)


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from(RULER_TASKS),
    st.lists(st.integers(700, 2000), min_size=1, max_size=2, unique=True),
    st.integers(0, 9),
)
def test_exact_lengths_and_the_same_again(kind: Any, lengths: list[int], seed: int) -> None:
    tasks = [kind(lengths=lengths, samples=2, seed=seed) for _ in range(2)]
    assert len(tasks[0]) == 2 * len(lengths)
    prompts = [[task.prompt(BYTES_CHAT, index).tokens for index in range(len(task))] for task in tasks]
    assert prompts[0] == prompts[1]
    assert [len(tokens) for tokens in prompts[0]] == [length for length in lengths for _ in range(2)]
    assert len(set(map(tuple, prompts[0]))) == len(prompts[0])


def test_names_and_settings() -> None:
    assert [task.name for task in RULER_TASKS] == [
        "ruler/niah_single",
        "ruler/niah_multikey",
        "ruler/niah_multivalue",
        "ruler/vt",
    ]
    for kind in RULER_TASKS:
        identity = kind(seed=3).identity()
        assert json.loads(json.dumps(identity)) == identity
        assert identity["task_settings"]["seed"] == 3


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [("words", WORDS), ("numbers", NUMBER), ("uuids", r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")],
)
def test_one_key(kind: str, pattern: str) -> None:
    task = NiahSingle(lengths=[900], samples=8, keys=kind, values=kind)
    seen = set()
    for index in range(8):
        text = text_of(task, index)
        ((key, value),) = re.findall(NEEDLE, text)
        assert task.sample(index).expected == [value] != [key]
        for name in (key, value):
            assert re.fullmatch(pattern, name)
            if kind == "uuids":
                assert uuid.UUID(name).version == 4
        assert f"Which access code does {key} have?\n" in text
        assert text.endswith(f"The access code of {key} is")
        assert text.count(key) == 3
        seen.add(value)
    assert len(seen) == 8


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 8), st.integers(0, 50))
def test_one_key_among_others(needles: int, seed: int) -> None:
    task = NiahMultikey(lengths=[1500], samples=1, needles=needles, seed=seed)
    text = text_of(task, 0)
    found = dict(re.findall(NEEDLE, text))
    assert len(found) == len(set(found.values())) == needles
    (key,) = re.findall(r"Which access code does (\S+) have", text)
    assert task.sample(0).expected == [found[key]]


def test_nothing_but_keys() -> None:
    """Others with the same key or the same value would make two answers right."""
    task = NiahMultikey(lengths=[9000], samples=1, haystack="needles", needles=3)
    text = text_of(task, 0)
    found = re.findall(NEEDLE, text)
    assert len(found) > 120
    (key,) = re.findall(r"Which access code does (\S+) have", text)
    ((value,),) = [task.sample(0).expected]
    assert [other for name, other in found if name == key] == [value]
    assert [name for name, other in found if other == value] == [key]
    left = re.sub(NEEDLE, "", text.split("\n\n")[1]).split(".")
    assert all(not part.strip() for part in left[1:])  # the first is the one that was cut


def test_several_values() -> None:
    task = NiahMultivalue(lengths=[1200], samples=3, needles=5, values="words")
    for index in range(3):
        text = text_of(task, index)
        found = re.findall(NEEDLE, text)
        assert len(found) == 5
        assert len({key for key, _ in found}) == 1
        assert sorted(value for _, value in found) == sorted(task.sample(index).expected)
        assert text.endswith(f"The access codes of {found[0][0]} are")
        assert "mentions 5;" in text


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 50))
def test_variables(chains: int, hops: int, seed: int) -> None:
    """The statements, run in the order of the text, give the expected variables the value, and no others."""
    task = VariableTracking(lengths=[2500], samples=1, chains=chains, hops=hops, seed=seed)
    text = text_of(task, 0)
    values: dict[str, str] = {}
    for name, source in re.findall(r"VAR ([A-Z]{5}) = ((?:VAR )?\w+)\.", text):
        assert name not in values
        values[name] = values[source.removeprefix("VAR ")] if source.startswith("VAR ") else source
    assert len(values) == chains * (hops + 1)
    assert len(set(values.values())) == chains
    (asked,) = re.findall(r"Which variables have the value (\d{5})\? There are (?:\d+); list", text)
    right = [name for name, value in values.items() if value == asked]
    assert task.sample(0).expected == right
    assert len(right) == hops + 1


def test_needles_are_spread_over_the_text() -> None:
    task = NiahSingle(lengths=[2000], samples=40)
    depths = [task.prompt(BYTES, index).depths[0] for index in range(40)]
    assert 35 < sum(depths) / 40 < 65
    assert min(depths) < 15
    assert max(depths) > 85


def test_scores_of_readers() -> None:
    """Whoever reads everything has all; whoever cannot read nothing; a share of what was asked counts as such."""
    for kind, pattern in (
        (NiahSingle, r"is (\d{7})\."),
        (NiahMultikey, r"is (\d{7})\."),
        (NiahMultivalue, r"is (\d{7})\."),
        (VariableTracking, r"VAR (\w+) ="),
    ):
        task = kind(lengths=[900, 800], samples=2)
        for model, expected in ((Reader(pattern), 100.0), (Reader("nothing of this"), 0.0)):
            task.check_model(model, BYTES)
            rows = [row for start in (0, 3) for row in task.answer(model, BYTES, range(start, min(start + 3, 4)))]
            assert json.loads(json.dumps(rows)) == rows
            assert task.score(rows) == {"recall": expected, "recall@900": expected, "recall@800": expected}


def test_scores_of_hand_made_answers() -> None:
    rows = [
        {"length": 10, "expected": ["ABCDE", "FGHIJ", "KLMNO", "PQRST"], "pred": "abcde, FGHIJ and PQRS"},
        {"length": 10, "expected": ["1234567"], "pred": "It is 1234567."},
        {"length": 20, "expected": ["1234567"], "pred": "123456"},
        {"length": 20, "expected": ["a-b", "c-d", "e-f"], "pred": "a-b"},
    ]
    expected = {"recall": 25 * (0.5 + 1 + 0 + 1 / 3), "recall@10": 75.0, "recall@20": 100 / 6}
    assert VariableTracking().score(rows) == pytest.approx(expected)


@pytest.mark.parametrize("kind", RULER_TASKS)
def test_stories260k_can_be_asked(data_dir: Path, kind: Any) -> None:
    """The machinery, not the model; essays as the text."""
    folder = data_dir / "models/stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    essay = data_dir / "needle/PaulGrahamEssays/sun.txt"
    task = kind(lengths=[480], samples=2, max_new_tokens=3, data=str(essay))
    task.check_model(model, tokenizer)
    rows = task.answer(model, tokenizer, range(2))
    assert [row["prompt_tokens"] for row in rows] == [480, 480]
    assert task.score(rows).keys() == {"recall", "recall@480"}


@pytest.mark.parametrize(
    ("kind", "wrong", "error", "message"),
    [
        (NiahSingle, {"keys": "names"}, TypeError, "keys"),
        (NiahSingle, {"needles": 4}, ValueError, "no setting 'needles'"),
        (NiahMultikey, {"needles": 1}, ValueError, "needles must lie between 2"),
        (NiahMultikey, {"haystack": "hay"}, TypeError, "haystack"),
        (NiahMultivalue, {"samples": 0}, ValueError, "samples must lie between 1"),
        (VariableTracking, {"hops": 0}, ValueError, "hops must lie between 1"),
        (VariableTracking, {"lengths": []}, ValueError, "lengths must hold at least one"),
    ],
)
def test_what_is_refused(kind: Any, wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kind(**wrong)


def test_prompts_that_are_too_short() -> None:
    with pytest.raises(ValueError, match="Prompts of 300 tokens are too short"):
        NiahMultivalue(lengths=[300, 900]).check_model(tiny_llama(), BYTES)
