"""POPE's scores against hand-computed cases and scikit-learn."""

from pathlib import Path

import evaluate
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from patchattn.evaluation.metrics import pope as module
from patchattn.evaluation.metrics.pope import Pope, is_neither, pope_scores, says_no


@pytest.mark.parametrize(
    ("answer", "is_no", "neither"),
    [
        ("Yes", False, False),
        ("yes, there is a dog in the image.", False, False),
        ("No", True, False),
        ("No, there is not.", True, False),
        ("no.", True, False),
        ("There is no dog.", True, False),
        ("The dog is not there", True, False),
        ("Well, no, there isn't", True, False),  # commas go before the text is split
        ("Yes. No.", False, False),  # the first sentence alone
        ("I see a cat. There is no dog.", False, True),
        ("There is a dog in the image.", False, True),
        ("NO", False, True),  # and the leniency of the rule:
        ("Not at all", False, True),
        ("No!", False, True),
        ("No\nThere is none", False, True),
        ("There isn't a dog", False, True),
        ("A notebook and a piano", False, True),
        ("", False, True),
        (".No", False, True),
        ("YES!", False, False),
        ("yesterday", False, True),
    ],
)
def test_the_official_rule(answer: str, is_no: bool, neither: bool) -> None:
    assert says_no(answer) == is_no
    assert is_neither(answer) == neither


def test_scores_by_hand() -> None:
    # said: yes yes yes no no; true: yes yes no no yes
    answers = ["Yes", "There is one", "yes", "No", "no, there is not"]
    assert pope_scores(answers, ["yes", "yes", "no", "no", "yes"]) == pytest.approx(
        {
            "accuracy": 3 / 5,
            "precision": 2 / 3,
            "recall": 2 / 3,
            "f1": 2 / 3,
            "yes_ratio": 3 / 5,
            "neither_ratio": 1 / 5,
        }
    )


ANSWERS = st.lists(st.tuples(st.sampled_from(["Yes", "No"]), st.sampled_from(["yes", "no"])), min_size=1)


@given(ANSWERS)
def test_scores_are_those_of_scikit_learn(rows: list[tuple[str, str]]) -> None:
    said, true = [row[0].lower() for row in rows], [row[1] for row in rows]
    scores = pope_scores([row[0] for row in rows], true)
    binary = {"pos_label": "yes", "zero_division": 0.0}
    assert scores["accuracy"] == pytest.approx(accuracy_score(true, said))
    assert scores["precision"] == pytest.approx(precision_score(true, said, **binary))
    assert scores["recall"] == pytest.approx(recall_score(true, said, **binary))
    assert scores["f1"] == pytest.approx(f1_score(true, said, **binary))
    assert scores["yes_ratio"] == pytest.approx(said.count("yes") / len(said))
    assert scores["neither_ratio"] == 0


def test_evaluate_loads_the_file_without_a_hub(tmp_path: Path) -> None:
    loaded = evaluate.load(module.__file__, cache_dir=str(tmp_path))
    for metric in (loaded, Pope(cache_dir=str(tmp_path))):
        metric.add_batch(predictions=["Yes", "no"], references=["yes", "yes"])
        metric.add(prediction="There is", reference="no")
        assert metric.compute() == pytest.approx(
            {
                "accuracy": 1 / 3,
                "precision": 1 / 2,
                "recall": 1 / 2,
                "f1": 1 / 2,
                "yes_ratio": 2 / 3,
                "neither_ratio": 1 / 3,
            }
        )


@pytest.mark.parametrize(
    ("answers", "labels", "message"),
    [
        ([], [], "at least one, got 0 and 0"),
        (["Yes"], ["yes", "no"], "one label per answer .* got 1 and 2"),
        (["Yes"], ["Yes"], "must be 'yes' or 'no', got 'Yes'"),
    ],
)
def test_what_is_refused(answers: list[str], labels: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pope_scores(answers, labels)
