"""`patchattn calibrate head-roles`, `lookback` and `vectors`: files in, files out, against the functions behind."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import patchattn
from patchattn.calibration.few_shot import first_answer_token, question_prompts
from patchattn.calibration.lookback import ContextAnswer, lookback_features, out_of_fold
from patchattn.calibration.records import read_records
from patchattn.calibration.vectors import find_vectors
from patchattn.cli import main as cli
from patchattn.core.heads import HeadList
from patchattn.core.importance import HeadImportance
from patchattn.inspection.head_codes import code_scores
from patchattn.inspection.head_functions import relation_salience, relation_scores
from patchattn.inspection.head_roles import ablation_scores, position_scores
from patchattn.inspection.lookback import LookbackProbe, lookback_ratios

from .long_context import BYTES, tiny_llama

PAIRS = [(a, a.upper()) for a in "abcdefghij"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_llama(num_hidden_layers=2).save_pretrained(path)
    BYTES.save_pretrained(path)
    return path


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command; returns exit code, stdout and stderr."""

    def call(command: str, *arguments: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["calibrate", command, str(folder), *map(str, arguments)])
        return int(ended.value.code or 0), *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return type(tiny_llama()).from_pretrained(folder).eval()


def lines(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_positional_heads(run: Any, model: Any, tmp_path: Path) -> None:
    texts = ["some words", "other ones, more of them"]
    data = lines(tmp_path / "texts.jsonl", *({"text": text} for text in texts))
    output, picture = tmp_path / "scores.json", tmp_path / "heads.png"
    how = ("--role", "position", "--data", data, "--offset", "-2", "--output", output)
    code, said, _ = run("head-roles", *how, "--plot", picture)
    assert code == 0
    inputs = [{"input_ids": torch.tensor([BYTES(text)["input_ids"]])} for text in texts]
    want = position_scores(model, inputs, offset=-2)
    found = HeadImportance.load(output)
    assert found.scores == want.scores
    assert found.settings == pytest.approx(want.settings)
    assert f"by chance {want.settings['chance']:.3f}" in said
    assert picture.stat().st_size > 1000
    assert run("head-roles", *how, "--top", 2)[0] == 0
    assert HeadList.parse(output).heads == want.highest(2).heads
    assert "--role is one of position, rarity" in run("head-roles", "--role", "pos", "--data", data)[2]
    assert "--offset is of the role position" in run("head-roles", "--role", "rarity", *how[2:])[2]


def test_temporal_heads_are_those_that_the_date_needs(run: Any, model: Any, tmp_path: Path) -> None:
    records = [
        {"prompt": "In 2009 it was", "without": "It was", "answer": " so"},
        {"prompt": "In 1999 they were", "without": "They were", "answer": " there"},
    ]
    data, output = lines(tmp_path / "prompts.jsonl", *records), tmp_path / "scores.json"
    assert run("head-roles", "--role", "temporal", "--data", data, "--output", output, "--batch-size", 1)[0] == 0
    found = HeadImportance.load(output)
    assert found.method == "temporal"
    want = {}
    for field in ("prompt", "without"):
        ids = [{"input_ids": torch.tensor([BYTES(record[field])["input_ids"]])} for record in records]
        answers = [[BYTES(" ", add_special_tokens=False)["input_ids"][0]]] * 2
        want[field] = ablation_scores(model, ids, answers).scores
    for name, scores in found.scores.items():
        np.testing.assert_allclose(scores, np.array(want["prompt"][name]) - want["without"][name], atol=1e-6)
    lines(data, *records, {"prompt": "In 1980", "answer": " x"})
    assert "or none has" in run("head-roles", "--role", "temporal", "--data", data)[2]


def test_heads_of_a_relation(run: Any, model: Any, tmp_path: Path) -> None:
    pairs = [{"source": a, "target": a.upper()} for a in "abcdef"]
    data, output = lines(tmp_path / "pairs.jsonl", *pairs, {"source": "no", "target": "YES"}), tmp_path / "scores.json"
    code, said, wrong = run("head-roles", "--role", "relation", "--data", data, "--rank", 60, "--output", output)
    assert code == 0, wrong
    assert "of 6 pairs of single tokens" in said
    ids: Any = [tuple(BYTES(pair[name], add_special_tokens=False)["input_ids"][0] for name in pair) for pair in pairs]
    assert HeadImportance.load(output).scores == relation_scores(model, ids, top=60).scores
    lines(data, {"source": "no", "target": "b"})
    assert "no source and target is a single token" in run("head-roles", "--role", "relation", "--data", data)[2]
    assert "--rank and --suppress are" in run("head-roles", "--role", "rarity", "--data", data, "--suppress")[2]


def test_salience_and_codes_have_files_and_pictures(run: Any, model: Any, tmp_path: Path) -> None:
    """Of words that may have no target, and of prompts of unequal length."""
    output, picture = tmp_path / "scores.json", tmp_path / "heads.png"
    how = ("--output", output, "--plot", picture)
    data = lines(tmp_path / "words.jsonl", {"source": "a"}, {"source": "b", "target": "no"}, {"source": "no"})
    code, _, wrong = run("head-roles", "--role", "salience", "--data", data, *how)
    assert code == 0, wrong
    ids = [BYTES(word, add_special_tokens=False)["input_ids"][0] for word in "ab"]
    want = {name: pytest.approx(scores) for name, scores in relation_salience(model, ids).scores.items()}
    assert HeadImportance.load(output).scores == want
    assert picture.stat().st_size > 1000
    prompts = [("a b a", "a b c"), ("longer b, longer", "longer b, other")]
    data = lines(tmp_path / "prompts.jsonl", *({"prompt": one, "without": other} for one, other in prompts))
    code, _, wrong = run("head-roles", "--role", "codes", "--data", data, "--batch-size", 1, *how)
    assert code == 0, wrong
    batches = [
        [{"input_ids": torch.tensor([BYTES(text)["input_ids"]])} for text in some]
        for some in zip(*prompts, strict=True)
    ]
    assert HeadImportance.load(output).scores == code_scores(model, *batches).scores
    assert (
        "a record has the fields prompt, without"
        in run("head-roles", "--role", "codes", "--data", lines(data, {"prompt": "a"}))[2]
    )


def answers(count: int) -> list[ContextAnswer]:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=6)) for _ in range(count)]
    return [
        ContextAnswer(f"It is {word}. Or not.", word if number % 2 else word[::-1], number % 2, "So: ", " What? ")
        for number, word in enumerate(words)
    ]


def test_features_are_of_the_context_and_the_answer(model: Any) -> None:
    given = answers(3)
    found = lookback_features(model, BYTES, given, batch_size=2)
    for row, one in zip(found.features, given, strict=True):
        prompt = f"{one.before}{one.context}{one.between}"
        ids = torch.tensor([BYTES(prompt + one.answer)["input_ids"]])
        start = 1 + len(one.before)  # a token per byte behind <s>
        span = (start, start + len(one.context))
        (ratios,) = lookback_ratios(model, {"input_ids": ids}, context=[span], answer=[len(one.answer)])
        np.testing.assert_allclose(row, ratios.mean(0).flatten(), rtol=1e-5)
    windows = lookback_features(model, BYTES, [*given, given[0]], window=4)
    assert len(windows.features) == 3 * 4
    assert windows.labels == [0] * 3 + [1] * 3 + [0] * 6
    assert windows.contexts == [0] * 3 + [1] * 3 + [2] * 3 + [0] * 3
    with pytest.raises(ValueError, match="tokens of their own"):
        lookback_features(model, BYTES, [ContextAnswer("", "x", 0)])


def test_a_probe_is_tried_on_contexts_that_it_was_not_fitted_on(model: Any) -> None:
    draw = np.random.default_rng(0)
    features = draw.normal(size=(12, 4))
    labels, groups = [0, 1] * 6, [place // 2 for place in range(12)]
    found = out_of_fold(model, torch.tensor(features), labels, groups, folds=3)
    for group in range(6):  # leaving a fold out: its groups are those that share the same fit
        same = [
            train
            for train in ([g for g in range(6) if g not in pair] for pair in _pairs(6))
            if group not in train
            and np.allclose(found[2 * group : 2 * group + 2], _fitted(features, labels, groups, train, group))
        ]
        assert same


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(a, b) for a in range(count) for b in range(a)]


def _fitted(features: Any, labels: list[int], groups: list[int], train: list[int], group: int) -> Any:
    rows = [place for place, each in enumerate(groups) if each in train]
    model = LogisticRegression(max_iter=1000).fit(features[rows], [labels[place] for place in rows])
    return model.predict_proba(features[[place for place, each in enumerate(groups) if each == group]])[:, 1]


def test_a_probe_from_a_file(run: Any, model: Any, tmp_path: Path) -> None:
    given = answers(12)
    data, output = lines(tmp_path / "answers.jsonl", *(vars(one) for one in given)), tmp_path / "lookback.json"
    code, said, _ = run("lookback", "--data", data, "--output", output, "--folds", 3, "--plot", tmp_path / "a.png")
    assert code == 0
    assert (tmp_path / "a.png").stat().st_size > 1000
    rows = lookback_features(model, BYTES, given)
    want = LookbackProbe.fit(model, rows.features, rows.labels)
    found = LookbackProbe.load(output)
    np.testing.assert_allclose(found.probability(rows.features), want.probability(rows.features), atol=1e-6)
    about = json.loads(output.read_text())["about"]
    assert 0 <= about["auroc"] <= 1
    assert f"AUROC {about['auroc']:.3f}" in said
    assert "--folds is 0, or from 2" in run("lookback", "--data", data, "--folds", 13)[2]
    lines(data, {"context": "a", "answer": "b", "label": 2})
    assert "a label is 1" in run("lookback", "--data", data, "--folds", 0)[2]


@pytest.mark.parametrize("kind", ["task", "function"])
def test_vectors_from_pairs(kind: str, run: Any, model: Any, tmp_path: Path) -> None:
    records = [{"question": question, "answer": answer} for question, answer in PAIRS]
    data, output = lines(tmp_path / "pairs.jsonl", *records), tmp_path / "vectors.json"
    how = ["--shots", 3, "--prompts", 4, "--data", data, "--output", output]
    more = ["--trials", 2, "--heads", 2, "--scores", tmp_path / "effects.json"] if kind == "function" else []
    code, said, wrong = run("vectors", "--kind", kind, *how, *more, "--plot", tmp_path / "a.png")
    assert code == 0, wrong
    assert (tmp_path / "a.png").stat().st_size > 1000
    saved = json.loads(output.read_text())
    (layer,) = saved["vectors"]
    assert f"Behind layer {layer}" in said
    order = np.random.default_rng(0).permutation(10)  # the first three of which are held
    held = [PAIRS[place] for place in order[:3]]
    prompts, right = [f"Q: {question}\nA:" for question, _ in held], []
    with patchattn.patched(model, f"{kind}_vectors", vectors=str(output)), torch.no_grad():
        for prompt in prompts:
            right.append(int(model(torch.tensor([BYTES(prompt)["input_ids"]])).logits[0, -1].argmax()))
    share = np.mean([token == BYTES(" ", add_special_tokens=False)["input_ids"][0] for token in right])
    assert saved["about"]["accuracy"][layer] == pytest.approx(share)
    assert saved["about"]["accuracy"][layer] == max(saved["about"]["accuracy"].values())
    if kind == "function":
        assert HeadImportance.load(tmp_path / "effects.json").method == "indirect_effect"
        return
    assert "which --kind function measures" in run("vectors", "--scores", "x.json", *how)[2]
    assert "got 7" in run("vectors", "--layer", 7, *how)[2]
    with pytest.raises(ValueError, match="between 0 and 1"):
        find_vectors(model, BYTES, PAIRS, held=1.0)


def test_answers_begin_where_the_prompt_ends() -> None:
    assert first_answer_token(BYTES, "Q: a\nA:", " B") == BYTES(" ", add_special_tokens=False)["input_ids"][0]
    with pytest.raises(ValueError, match="adds no token"):
        first_answer_token(BYTES, "Q: a", "")
    (batch,) = question_prompts(BYTES, PAIRS[:2], template="{}={};")
    assert batch.texts == ["a=", "b="]
    assert batch.answers == BYTES("AB", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "x", "expected a file of the kinds .jsonl, .tsv"),
        ("a.jsonl", "", "holds no record"),
        ("a.jsonl", '{"question": "x"}', "line 1: a record has the fields question, answer"),
        ("a.jsonl", '{"question": "x", "answer": "y", "more": "z"}', "and may have note"),
        ("a.jsonl", '{"question": "x", "answer": 0.5}', "answer is a text"),
        ("a.tsv", "question\tanswer\nx\n", "line 2: expected 2 columns"),
    ],
)
def test_broken_records(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / name, ("question", "answer"), ("note",))


def test_records_of_both_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("question\tanswer\nx\t1\n")
    (tmp_path / "a.jsonl").write_text('{"question": "x", "answer": 1}\n')
    for name in ("a.tsv", "a.jsonl"):
        found = read_records(tmp_path / name, ("question", "answer"), ("note",))
        assert found == [{"question": "x", "answer": "1", "note": ""}]
    with pytest.raises(ValueError, match="There is no file"):
        read_records(tmp_path / "b.tsv", ("question",))
