"""benchmarks/heads.py: its differences by formulas, masking against hooks, and a run that goes on where it stopped."""

import importlib
import json
import math
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from patchattn.decoding.text import context_spans
from patchattn.inspection.retrieval import RetrievalTrial

from .long_context import BYTES, BYTES_CHAT, tiny_llama

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
heads: Any = importlib.import_module("heads")
sys.path.pop(0)
common, contrast, masking, retrieval = (
    sys.modules[f"heads_parts.{name}"] for name in ("common", "contrast", "masking", "retrieval")
)
LAYERS, HEADS, DIM = 6, 8, 8


@pytest.fixture
def setup(tmp_path: Path) -> Any:
    model = tiny_llama(num_hidden_layers=LAYERS, num_attention_heads=HEADS, hidden_size=HEADS * DIM)
    text = tmp_path / "text.txt"
    text.write_text("A sentence of a text. " * 200)
    return common.Setup(model, BYTES_CHAT, text, tmp_path / "rows", 2, (300, 400))


def scored(setup: Any) -> np.ndarray:
    """Rows of scores: two texts that count, and one that does not."""
    scores = np.random.default_rng(0).random((2, LAYERS, HEADS))
    for number, each in enumerate([*scores.tolist(), None]):
        setup.write("retrieval", f"300/{number}", {"scores": each})
    return scores.mean(0)


def test_differences_are_of_pairs_and_claims_need_two_standard_errors() -> None:
    difference, error = common.paired([1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0])
    assert (difference, error) == (0.5, pytest.approx(stats.sem([1, -1, 1, 1])))
    assert math.isnan(common.paired([1.0], [0.0])[1])
    said = [
        common.verdict("C", *pair, "points", wants=-1) for pair in ((-3, 1), (-2, 1), (3, 1), (0, 0), (1, math.nan))
    ]
    assert [line.split("**")[1] for line in said] == [
        "shown",
        "not shown",
        "not shown, the opposite is",
        "not shown",
        "not measured",
    ]
    assert "-3.00 points, standard error 1.00" in said[0]


def test_random_heads_are_none_of_the_best(setup: Any) -> None:
    scores = scored(setup)
    order = np.argsort(-scores, axis=None)
    assert common.ranking(setup) == [divmod(int(place), HEADS) for place in order]
    setup.write("retrieval", "300/3", {"scores": (1 - scores).tolist()})
    assert common.ranking(setup) == [divmod(int(place), HEADS) for place in order]  # fixed when first asked for
    lists = common.top_and_random(setup, (1, 2))
    for count in (5, 10, 20):
        chosen = {
            kind: {(int(layer), head) for layer, some in lists[f"{kind} {count}"]["heads"].items() for head in some}
            for kind in ("top", "random")
        }
        assert chosen["top"] == {divmod(int(place), HEADS) for place in order[:count]}
        assert len(chosen["random"]) == count
        assert not chosen["random"] & {divmod(int(place), HEADS) for place in order[:20]}
    assert common.top_and_random(setup, (1, 3)) != lists


def test_heads_are_masked_from_the_last_token_of_the_prompt_on(setup: Any) -> None:
    """Against one forward over everything in which hooks set columns of queries to zero."""
    scored(setup)
    tokens, answer = random.Random(0).choices(range(3, 200), k=40), 6
    found = masking._row(setup, tokens, answer, (7,))
    assert list(found) == ["dense", "top 5", "random 5", "top 10", "random 10", "top 20", "random 20"]
    for name, (right, loss) in found.items():
        lists = {} if name == "dense" else common.top_and_random(setup, (7,))[name]["heads"]
        hooks = []
        for layer, some in lists.items():

            def zero(module: Any, args: Any, output: torch.Tensor, some: Any = some) -> torch.Tensor:
                output = output.clone().unflatten(-1, (HEADS, DIM))
                output[:, 40 - answer - 1 :, some] = 0
                return output.flatten(-2)

            projection = setup.model.model.layers[int(layer)].self_attn.q_proj
            hooks.append(projection.register_forward_hook(zero))
        with torch.no_grad():
            logits = setup.model(torch.tensor([tokens])).logits[0].double()
        for hook in hooks:
            hook.remove()
        rows = range(40 - answer - 1, 39)
        losses = [-float(logits[row].log_softmax(-1)[tokens[row + 1]]) for row in rows]
        assert loss == pytest.approx(np.mean(losses), abs=2e-5), name
        assert right == float(all(int(logits[row].argmax()) == tokens[row + 1] for row in rows))


def test_a_text_that_the_model_cannot_answer_does_not_count(setup: Any) -> None:
    tokens = list(range(3, 60))
    said = [*tokens[5:9], *tokens, *tokens[5:9]]
    assert retrieval._row(setup, RetrievalTrial(said, (0, 4), 4)) == {"scores": None}
    with torch.no_grad():
        follows = int(setup.model(torch.tensor([tokens])).logits[0, -1].argmax())
    row = retrieval._row(setup, RetrievalTrial([follows, *tokens[1:], follows], (0, 1), 1))
    assert row == {"scores": None} or np.shape(row["scores"]) == (LAYERS, HEADS)


def test_the_context_is_what_cad_leaves_out() -> None:
    tokens, span = contrast.prompt(BYTES_CHAT, "Why?", "It is so.")
    assert BYTES.decode(tokens) == "<s><user>It is so. Why?<model>"
    assert BYTES.decode(tokens[span[0] : span[1]]) == "It is so."
    assert contrast.prompt(BYTES_CHAT, "Why?", "")[1] is None
    with context_spans([span]):
        pass
    assert contrast.says("The capital is Paris.", "paris") == 100
    assert contrast.says("Parisians", "Paris") == 0
    asked = contrast.facts()
    assert len({fact.question for fact in asked}) == len(asked) > 60
    assert all(fact.known != fact.swapped and fact.swapped in fact.context for fact in asked)
    assert not any(fact.known in fact.context for fact in asked)


def test_a_run_goes_on_where_it_stopped(setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def part(name: str, count: int) -> ModuleType:
        found: Any = ModuleType(name)
        found.NAME, found.STAGE = name, int(name == "late")
        found.jobs = lambda _: [(str(n), lambda n=n: ran.append(f"{name}{n}") or {"n": n}) for n in range(count)]
        found.section = lambda setup, _: [f"{name}: {sorted(setup.rows(name))}"]
        return found

    parts = (part("late", 1), part("a", 2), part("b", 4))
    heads.measure(setup, parts, -1.0)
    assert not ran
    heads.measure(setup, parts, 1e9)
    assert ran == ["b0", "a0", "b1", "b2", "a1", "b3", "late0"]
    path = setup.folder / "a.jsonl"
    path.write_text(path.read_text()[:-4])  # the machine went down
    assert list(setup.rows("a")) == ["0"]
    heads.measure(setup, parts, 1e9)
    assert ran[7:] == ["a1"]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"key": "0", "n": 0}, {"key": "1", "n": 1}]
    text = heads.page(setup, parts, "about", None)
    assert "late: ['0']" in text
    assert "late 1 of 1 rows; a 2 of 2 rows; b 4 of 4 rows." in text


def test_pages_say_what_rows_say(setup: Any) -> None:
    lists = ["dense", "top 5", "random 5", "top 10", "random 10", "top 20", "random 20"]
    for number, dense in enumerate([1.0, 1.0, 1.0, 0.0]):
        found = {name: [0.0 if name.startswith("top") else dense, 2.0 + number * (name == "top 20")] for name in lists}
        setup.write("masking", f"needle/300/{number}", {"found": found})
        setup.write("masking", f"text/{number}", {"found": {name: [0.0, 3.0] for name in lists}})
    lines = masking.section(setup, None)
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines if "|" in line
    }
    assert cells["top 20"][:4] == ["0", "-75 ± 25", "3.50", "+1.50 ± 0.65"]
    assert cells["dense"][4] == cells["top 5"][4] == f"{math.exp(3):.2f}"
    assert sum("**shown**" in line for line in lines) == 4  # three of accuracy, and the loss of the top 20
    wrong, right = "It is Rome.", "It is Paris."
    answers = {name: [right, wrong] for name in contrast.settings(setup_with(setup), 0, "swapped")}
    row = {"found": answers, "known": ["Rome", "Rome"], "swapped": ["Paris", "Paris"]}
    setup.write("contrast", "swapped/0", row | {"found": {**answers, "cad, alpha 1": [right, right]}})
    setup.write("contrast", "closed/0", row)
    lines = contrast.section(setup, None)
    (line,) = [line for line in lines if line.startswith("| cad, alpha 1 ")]
    assert [cell.strip() for cell in line.split("|")[2:6]] == ["100", "+50.0 ± 50.0", "0", "-50.0 ± 50.0"]


def setup_with(setup: Any) -> Any:
    scored(setup)
    return setup
