"""Parts of benchmarks/heads.py: what their figures are, against loops and against numbers made by hand."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import BertConfig, BertForSequenceClassification

from .long_context import BYTES_CHAT, tiny_llama

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
importlib.import_module("heads")
sys.path.pop(0)
common, lookback, massive, rollout, speech = (
    sys.modules[f"heads_parts.{name}"] for name in ("common", "lookback", "massive", "rollout", "speech")
)


@pytest.fixture
def setup(tmp_path: Path) -> Any:
    text = tmp_path / "text.txt"
    text.write_text("A sentence of a text. " * 500)
    model = tiny_llama(num_hidden_layers=2, max_position_embeddings=1024)
    return common.Setup(model, BYTES_CHAT, text, tmp_path / "rows", 2)


def test_contexts_hold_one_answer_and_labels_say_which_was_given() -> None:
    for draw, number in ((0, 3), (1, 3), (1, 40)):
        fact, context = lookback.question(draw, number)
        assert fact.context in context
        assert lookback.says(context, fact.swapped) == 100
        assert lookback.says(context, fact.known) == 0
        assert context.count(". ") >= 2 * lookback.BESIDE + 1
    assert lookback.question(0, 3)[0].question == lookback.question(0, 3)[0].question
    fact = SimpleNamespace(known="Paris", swapped="Rome")
    said = ["It is Rome.", "It is Paris.", "Rome, not Paris", "I do not know"]
    assert [lookback.label(answer, fact) for answer in said] == [1, 0, None, None]


def test_areas_are_shares_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookback, "RESAMPLES", 40)
    labels, questions = np.array([1, 0, 1, 0, 1]), ["a", "a", "b", "c", "d"]
    scores = np.array([0.9, 0.2, 0.4, 0.5, 0.6])
    found = lookback.auroc(labels, {"x": scores, "y": -scores}, questions)
    pairs = [(a, b) for a in scores[labels == 1] for b in scores[labels == 0]]
    assert found["x"][0] == pytest.approx(np.mean([a > b for a, b in pairs]))
    np.testing.assert_allclose(found["y"], 1 - found["x"])  # of the same resamplings
    assert len(found["x"]) == 1 + lookback.RESAMPLES
    assert 0 < found["x"][1:].std() < 0.5


def test_a_row_of_answers(setup: Any) -> None:
    row = lookback._row(setup, [(0, 0), (0, 1)])["found"]
    heads = setup.model.config.num_attention_heads * setup.model.config.num_hidden_layers
    assert row
    assert all(len(each["ratios"]) == heads and each["likelihood"] < 0 for each in row)


def test_what_is_changed_of_massive_entries(setup: Any) -> None:
    found = SimpleNamespace(
        first=1,
        threshold=100.0,
        layers=[
            SimpleNamespace(layer=0, dimensions={}),
            SimpleNamespace(layer=1, dimensions={3: SimpleNamespace(mean=500.0), 5: SimpleNamespace(mean=-200.0)}),
        ],
    )
    for seed in range(4):
        settings = massive.interventions(found, 8, seed)
        known = {"values": {"1": {"3": 500.0, "5": -200.0}}, "threshold": 100.0}
        assert settings["zero"] == {"activations": known}
        assert settings["mean"] == {"activations": known, "to": "mean"}
        (others,) = settings["others"]["activations"].values()
        assert len(others) == 2
        assert not {"3", "5"} & set(others)
    jobs = dict(massive.jobs(setup))
    assert list(jobs) == ["found", "text/0", "text/1"]
    row = jobs["found"]()
    assert row["sequences"] == massive.SEARCHED
    assert jobs["text/0"]().keys() == {"found"}  # nothing is massive in it: the model as it is alone
    setup.write("massive", "found", row)
    assert any("Some entries are massive: **not shown**" in line for line in massive.section(setup, None))


def test_the_page_of_massive_entries(setup: Any) -> None:
    plain = {"largest": [3.0, 2.0, 1.0], "median": 1.0, "dimensions": {}}
    spikes = {"3": {"mean": 500.0, "count": 4, "tokens": {"0": 3, "7": 1}, "ids": {"9": 4}}}
    layers = [plain, {"largest": [2000.0, 2.0, 1.0], "median": 1.0, "dimensions": spikes}]
    setup.write("massive", "found", json.loads(json.dumps({"sequences": 3, "layers": layers})))
    for number, loss in enumerate([2.0, 2.2]):
        rows = {"dense": loss, "zero": loss + 1 + number / 10, "mean": loss, "others": loss + 0.01}
        setup.write("massive", f"text/{number}", {"found": rows})
    page = "\n".join(massive.section(setup, None))
    assert "75 % of 4 entries; the others mostly at token 7 (1)." in page
    assert "The largest is 2000, 2000 times the median, behind layer 1." in page
    assert f"+1.050 ± {stats.sem([1, 1.1]):.3f}" in page
    assert "Without massive entries texts are less likely: **shown**" in page


def test_what_an_answer_hangs_on() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=30, initializer_range=0.4, attn_implementation="eager", **sizes)
    model: Any = BertForSequenceClassification(config).eval()
    ids, ends = [1, 9, 4, 22, 7, 2], slice(1, -1)
    with torch.no_grad():
        whole = model(torch.tensor([ids]), output_attentions=True)
        answer = int(whole.logits.argmax())
        changes = []
        for place in range(1, 5):
            other = [3 if at == place else token for at, token in enumerate(ids)]
            shares = [model(torch.tensor([each])).logits.softmax(-1)[0, answer] for each in (ids, other)]
            changes.append(abs(float(shares[1] - shares[0])))
    np.testing.assert_allclose(rollout.blanked(model, ids, 3), changes, atol=1e-6)
    found = rollout.importances(model, ids)
    layers = [layer[0].mean(0).double().numpy() for layer in whole.attentions]
    np.testing.assert_allclose(found["last"], layers[-1][0, ends], atol=1e-6)
    np.testing.assert_allclose(found["mean"], np.mean(layers, axis=0)[0, ends], atol=1e-6)
    mixed = [(layer + np.eye(6)) / 2 for layer in layers]
    np.testing.assert_allclose(found["rollout"], (mixed[1] @ mixed[0])[0, ends], atol=1e-6)
    table = model.get_input_embeddings().weight
    step, slopes = 1e-2, []
    for place in range(1, 5):  # the derivative along the embedding itself
        logits = []
        for sign in (1, -1):
            embedded = table[torch.tensor([ids])].detach().clone()
            embedded[0, place] *= 1 + sign * step
            with torch.no_grad():
                logits.append(float(model(inputs_embeds=embedded).logits[0, answer]))
        slopes.append(abs(logits[0] - logits[1]) / (2 * step))
    np.testing.assert_allclose(found["gradient"], slopes, rtol=0.02, atol=1e-3)


def test_where_a_head_looks_while_a_word_is_written() -> None:
    """Three words, the last of two tokens, and 30 frames of a second; one head follows them, one is a word late."""
    times, rows = [(2.0, 5.0), (8.0, 12.0), (20.0, 24.0)], [range(1, 2), range(2, 3), range(3, 5)]
    follows, late = torch.zeros(2, 6, 30)
    for row, (a, b) in enumerate([(3, 10), (10, 21), (21, 3), (22, 4)], start=1):
        follows[row, a], late[row, b] = 1.0, 1.0
    site = SimpleNamespace(layer_index=0)
    maps = [SimpleNamespace(site=site, weights=weights) for weights in (follows, late)]
    found = speech.looks(maps, rows, times)
    assert found == {"hit": [[1.0, 0.0]], "next": [[0.0, 1.0]], "mass": [[1.0, 0.0]]}


def test_parts_without_a_model_have_nothing_to_do(setup: Any) -> None:
    assert rollout.jobs(setup) == speech.jobs(setup) == []
    for part in (lookback, massive, rollout, speech):
        assert part.section(setup, None)[-1] == "Not measured yet."


def test_single_numbers_are_taken_in_the_better_direction() -> None:
    labels, values = np.array([1, 0, 1, 0]), np.array([0.1, 0.9, 0.2, 0.8])
    np.testing.assert_array_equal(lookback.better_way(values, labels), -values)
    np.testing.assert_array_equal(lookback.better_way(-values, labels), -values)
