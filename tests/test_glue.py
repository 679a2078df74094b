"""GLUE: the official metrics against formulas in numpy, files in every layout, the Hub, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import evaluate
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, matthews_corrcoef

from patchattn.demo.tasks import load_sst2
from patchattn.evaluation import GLUE_TASKS, load_glue, read_glue
from patchattn.evaluation.metrics import glue as module
from patchattn.evaluation.metrics.glue import Glue

BINARY = ["cola", "mrpc", "qqp", "sst2", "qnli", "rte", "wnli"]


def compute(task: str, predictions: list[float], references: list[float]) -> dict[str, float]:
    return Glue(task, keep_in_memory=True).compute(predictions=predictions, references=references)


def counts(predictions: np.ndarray, references: np.ndarray) -> tuple[int, int, int, int]:
    """True positives, true negatives, false positives, false negatives."""
    return tuple(int(((predictions == p) & (references == r)).sum()) for p, r in ((1, 1), (0, 0), (1, 0), (0, 1)))


@pytest.mark.filterwarnings("ignore:A single label")
@pytest.mark.parametrize("task", BINARY)
def test_labels_against_their_formulas(task: str) -> None:
    """One `compute` writes a table, so a few drawn cases with it; the functions below it are tried with many."""
    generator = np.random.default_rng(0)
    for size in (1, 7, 40):
        predictions, references = generator.integers(2, size=(2, size))
        tp, tn, fp, fn = counts(predictions, references)
        got = compute(task, predictions.tolist(), references.tolist())
        if task == "cola":
            root = np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
            expected = {"matthews_correlation": (tp * tn - fp * fn) / root if root else 0.0}
        else:
            expected = {"accuracy": (tp + tn) / size}
        if task in ("mrpc", "qqp"):
            expected["f1"] = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0
        assert got == pytest.approx(expected, abs=1e-12)


@pytest.mark.filterwarnings("ignore:A single label")
@hypothesis_settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30))
def test_f1_and_matthews_of_any_labels(pairs: list[tuple[int, int]]) -> None:
    predictions, references = np.array(pairs).T
    tp, tn, fp, fn = counts(predictions, references)
    f1 = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0
    assert module.accuracy_and_f1(predictions, references)["f1"] == pytest.approx(f1)
    root = np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    expected = (tp * tn - fp * fn) / root if root else 0.0
    assert module.matthews(predictions, references)["matthews_correlation"] == pytest.approx(expected)


def test_three_classes() -> None:
    assert compute("mnli", [0, 1, 2, 2], [0, 1, 1, 2]) == {"accuracy": 0.75}


def ranks(values: np.ndarray) -> np.ndarray:
    """Mean ranks, brute force: how many are smaller, and half of the equal ones."""
    return np.array([(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values])


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))


def test_correlations_against_their_formulas_with_ties() -> None:
    generator = np.random.default_rng(1)
    references = generator.integers(0, 11, size=60) / 2
    predictions = np.round(references + generator.normal(size=60), 1).astype(np.float32).astype(float)
    got = compute("stsb", predictions.tolist(), references.tolist())
    expected = {
        "pearson": pearson(predictions, references),
        "spearmanr": pearson(ranks(predictions), ranks(references)),
    }
    assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("references", [[0, 1, 1], [1, 1, 1], [0, 0, 0]])
@pytest.mark.parametrize("constant", [0, 1])
def test_constant_predictions(constant: int, references: list[int]) -> None:
    predictions = [constant] * 3
    assert compute("cola", predictions, references) == {"matthews_correlation": 0.0}
    share = references.count(constant) / 3
    right = compute("mrpc", predictions, references)
    assert right["accuracy"] == pytest.approx(share)
    assert right["f1"] == pytest.approx(2 * share / (1 + share) if constant else 0.0)
    # the official script calls these with their defaults
    assert right["f1"] == f1_score(y_true=references, y_pred=predictions)
    assert matthews_corrcoef(references, predictions) == 0.0
    assert all(np.isnan(value) for value in compute("stsb", predictions, [0.0, 1.0, 2.0]).values())


def test_evaluate_loads_the_file_without_a_hub(tmp_path: Path) -> None:
    metric = evaluate.load(module.__file__, "mrpc", cache_dir=str(tmp_path))
    metric.add_batch(predictions=[1, 0], references=[1, 1])
    metric.add(prediction=0, reference=0)
    assert metric.compute() == pytest.approx({"accuracy": 2 / 3, "f1": 2 / 3})


@pytest.mark.parametrize("name", [None, "mprc"])
def test_unknown_metrics_are_refused(name: str | None) -> None:
    with pytest.raises(ValueError, match=rf"one of cola, sst2, .*, got {name!r}"):
        Glue(name)


def test_without_the_extra_the_error_says_what_to_install() -> None:
    script = """
import sys
for name in ("datasets", "evaluate", "sklearn"):
    sys.modules[name] = None
import patchattn.evaluation
for act in (lambda: patchattn.evaluation.load_glue("rte"), lambda: __import__("patchattn.evaluation.metrics.glue")):
    try:
        act()
    except ImportError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    assert done.stdout.count('datasets: pip install "patchattn[eval]"') == 2


SIZES = {  # of GLUE (CoLA, SST-2, STS-B, RTE, WNLI's validation), the original corpus (MRPC) and third-party subsets
    "cola": (8551, 1043),
    "sst2": (67349, 872),
    "mrpc": (4076, 1725),
    "stsb": (5749, 1500),
    "qqp": (8999, 1000),
    "mnli": (8999, 1000),
    "qnli": (8999, 1000),
    "rte": (2490, 277),
    "wnli": (None, 71),
}


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_real_files(task: str, data_dir: Path) -> None:
    rows = read_glue(data_dir / "glue" / GLUE_TASKS[task].folder, task)
    for split, size in zip(rows, SIZES[task], strict=True):
        assert size in (None, len(split))
        labels = {label for _, _, label in split}
        expected = {2.0, 5.0} if task == "stsb" else set(range(3 if task == "mnli" else 2))
        assert expected <= labels
        assert task == "stsb" or labels == expected
        for first, second, _ in split:
            assert first
            assert "\t" not in first
            assert (second is None) == (task in ("cola", "sst2"))


def test_rows_of_real_files(data_dir: Path) -> None:
    """Read by eye from the files: quotation marks are text, labels are GLUE's, the mark of byte order is no text."""
    folder = data_dir / "glue"
    train, validation = load_glue("mrpc", folder)
    assert train.column_names == ["sentence1", "sentence2", "label"]
    assert train[0] == {
        "sentence1": 'Amrozi accused his brother, whom he called "the witness", of deliberately distorting his '
        "evidence.",
        "sentence2": 'Referring to him as only "the witness", Amrozi accused his brother of deliberately distorting '
        "his evidence.",
        "label": 1,
    }
    assert len(validation) == 1725
    train, validation = load_glue("cola", folder)
    assert validation[0] == {
        "sentence1": "The sailors rode the breeze clear of the rocks.",
        "sentence2": None,
        "label": 1,
    }
    assert validation[527]["sentence1"] == "Somebody just left - guess who."
    assert [load_glue("rte", folder)[1][row]["label"] for row in (0, 1)] == [1, 0]
    assert [load_glue("mnli", folder)[0][row]["label"] for row in (0, 2)] == [0, 1]
    assert load_glue("stsb", folder)[1][:2]["label"] == [5.0, 4.75]


def write(folder: Path, task: str, content: str | bytes) -> Path:
    """The training file of a task, and validation files that are right."""
    asked = GLUE_TASKS[task]
    folder.mkdir(exist_ok=True)
    path = folder / asked.train[0]
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("sst2", None, r"There is no file .*train\.tsv.* sst2 must hold: train\.tsv, dev\.tsv"),
        ("sst2", "", r"must begin with a header line with label, sentence, got \[''\]"),
        ("sst2", "text\tlabel\nx\t1\n", "header line with sentence, got"),
        ("sst2", "sentence\tlabel\n", "has no rows"),
        ("sst2", "sentence\tlabel\nx\t2\n", "line 2: the label must be 0 or 1, got '2'"),
        ("sst2", "sentence\tlabel\nx\t1\ny\n", r"line 3: expected 2 columns \(sentence, label\), got 1"),
        ("sst2", "sentence\tlabel\nx\t1\n\ny\t1\n", "line 3: expected 2 columns"),
        ("sst2", "sentence\tlabel\nx\t1\t1\n", "line 2: expected 2 columns .* got 3"),
        ("sst2", "sentence\tlabel\nx\t1\ny\t1", "ends within a line: is it cut off"),
        ("sst2", b"sentence\tlabel\n\xff\t1\n", "line 2: not UTF-8"),
        ("rte", "sentence1\tsentence2\tlabel\na\tb\tentail\n", "must be entailment or not_entailment, got 'entail'"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\tx\n", "line 2: the score must be a number from 0 to 5, got 'x'"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\t5.1\n", "number from 0 to 5, got '5.1'"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\tnan\n", "number from 0 to 5, got 'nan'"),
        ("cola", "s\t1\t\tA.\ns\t1\t\n", "line 2: expected 4 columns"),
        ("cola", "s\t*\t\tA.\n", r"line 1: the label must be 0 or 1, got '\*'"),
        ("qnli", '{"0": {"text_a": "a",\n "text', r"train\.json, line 2: not valid JSON: Unterminated"),
        ("qnli", '["a"]', "must hold a mapping of ids to rows"),
        (
            "qnli",
            '{"7": {"text_a": "a", "label": "entailment"}}',
            "row '7': expected texts named text_a, text_b, label",
        ),
        ("qqp", '{"7": {"text_a": "a", "text_b": "b", "label": 1}}', "row '7': expected texts named"),
        ("qqp", "{}", "has no rows"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, task: str, content: str | bytes | None, message: str) -> None:
    if content is not None:
        write(tmp_path, task, content)
    with pytest.raises(ValueError, match=message) as error:
        read_glue(tmp_path, task)
    assert str(tmp_path) in str(error.value)


def test_unknown_tasks_are_named() -> None:
    with pytest.raises(ValueError, match="GLUE has no task 'sts-b'; did you mean 'stsb'"):
        load_glue("sts-b")


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_the_hub_gives_the_same_columns(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = GLUE_TASKS[task]
    column = {name: [f"{name} {i}" for i in range(3)] for name in asked.hub_texts}
    split = datasets.Dataset.from_dict({"idx": [0, 1, 2], **column, "label": [1, 0, 1]})
    splits = dict.fromkeys(
        ["train", "test", *(["validation_matched", "validation_mismatched"] if task == "mnli" else ["validation"])],
        split,
    )
    asked_for = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *given: asked_for.append(given) or splits)
    for made in load_glue(task):
        assert made.column_names == ["sentence1", "sentence2", "label"]
        assert made["sentence1"][2] == f"{asked.hub_texts[0]} 2"
        assert made["sentence2"][2] == (f"{asked.hub_texts[1]} 2" if asked.hub_texts[1:] else None)
        assert made["label"][:] == [1, 0, 1]
    assert asked_for == [("nyu-mll/glue", task)]


def test_an_unreachable_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*given: str) -> None:
        raise ConnectionError("No way.\nTraceback")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"rte cannot be loaded from the Hub \(No way\)\. Give the folder"):
        load_glue("rte")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="or give --data"):
        load_sst2(None)


def test_json_ids_may_be_anything(tmp_path: Path) -> None:
    rows = {"b": {"text_a": "x", "text_b": "y", "label": "1"}, "a": {"text_a": 'z "', "text_b": "", "label": "0"}}
    for name in ("train.json", "dev.json"):
        (tmp_path / name).write_text(json.dumps(rows))
    assert read_glue(tmp_path, "qqp")[0] == [("x", "y", 1), ('z "', "", 0)]
