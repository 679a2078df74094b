"""LongBench's metrics: cases computed by hand, brute force, and the `evaluate` module."""

import itertools
import sys
from pathlib import Path

import evaluate
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from patchattn.evaluation.metrics import longbench as module
from patchattn.evaluation.metrics.longbench import LongBench, longbench_score

WORDS = st.lists(st.sampled_from("abc"), max_size=6)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("The cat.", "a CAT", 1.0),
        ("a big cat", "cat", 2 / 3),  # precision 1/2, recall 1
        ("cat cat dog", "cat dog dog", 2 / 3),  # one cat and one dog in common
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("the", "an", 0.0),  # nothing is left of either
        ("it's", "its", 1.0),  # punctuation is removed, not replaced by a space
        ("state-of-the-art", "stateoftheart", 1.0),
        ("theory", "ory", 0.0),  # articles are whole words
    ],
)
def test_words(prediction: str, answer: str, expected: float) -> None:
    assert module.word_f1(prediction, answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("厦门大学。", "厦门大学", 1.0),
        ("厦门 大学", "“厦门”,大学!", 1.0),
        ("我在厦门大学", "厦门大学", 2 / 4),  # 我 / 在 / 厦门大学
        ("北京", "厦门大学", 0.0),
        ("ABC公司", "abc公司", 1.0),
        ("。\uff01", "。\uff01", 0.0),
    ],
)
def test_chinese_words(prediction: str, answer: str, expected: float) -> None:
    assert module.word_f1_zh(prediction, answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("a b c", "a b c", 1.0),
        ("a c", "a b c", 2 * 2 / (2 + 3)),
        ("c b a", "a b c", 2 * 1 / (3 + 3)),  # any one word
        ("a a a", "a", 1.0),  # repeated words count once
        ("x y. a c", "a b c", 2 * 2 / (4 + 3)),  # each sentence on its own
        ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 2 * 4 / (8 + 5)),  # w1 w2, and w1 w3 w5
        ("a b. ", "a b", 2 * 2 / (3 + 2)),  # what follows the full stop is a sentence of one empty word
        ("a b.", "a b", 1.0),
        ("A", "a", 0.0),
        ("", "a", 0.0),
        ("..", "a", 0.0),
    ],
)
def test_rouge(prediction: str, answer: str, expected: float) -> None:
    assert module.rouge_l(prediction, answer) == pytest.approx(expected)


def test_rouge_of_chinese() -> None:
    """会议 / 讨论 / 了 / 教育 / 问题 against 会议 / 讨论 / 教育."""
    assert module.rouge_l_zh("会议讨论了教育问题", "会议讨论教育") == pytest.approx(2 * 3 / (5 + 3))


def subsequences(words: list[str]) -> set[tuple[str, ...]]:
    return {kept for size in range(len(words) + 1) for kept in itertools.combinations(words, size)}


@hypothesis_settings(deadline=None)
@given(WORDS, WORDS)
def test_common_subsequences_are_longest(left: list[str], right: list[str]) -> None:
    found = tuple(reversed(module._common_subsequence(left, right)))
    common = subsequences(left) & subsequences(right)
    assert found in common
    assert len(found) == max(map(len, common))


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("Food", "Food", 1.0),
        ("It is Food or Date", "Food", 0.5),
        ("It is Date", "Food", 0.0),
        ("food", "Food", 0.0),
        ("", "Food", 0.0),
        ("Other location", "Other location", 1.0),  # "location" is part of the right one
        ("location", "Other location", 0.0),
        ("Other location", "location", 0.5),  # but not the reverse
    ],
)
def test_classes(prediction: str, answer: str, expected: float) -> None:
    assert module.classification(prediction, answer, ["Food", "Date", "location", "Other location"]) == expected


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("3", 1.0),
        ("There are 3.", 1.0),
        ("3 of 12", 0.5),
        ("3, 3, 30", 2 / 3),
        ("13", 0.0),
        ("03", 0.0),
        ("three", 0.0),
    ],
)
def test_numbers(prediction: str, expected: float) -> None:
    assert module.count(prediction, "3") == pytest.approx(expected)
    assert module.retrieval(prediction, "Paragraph 3") == pytest.approx(expected)
    assert module.retrieval(prediction, "段落3") == pytest.approx(expected)


def test_an_answer_without_a_paragraph() -> None:
    with pytest.raises(ValueError, match="such as 'Paragraph 3' or '段落3', got '3'"):
        module.retrieval("3", "3")


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("x = 1", "x = 1", 1.0),
        ("\n\nx = 1\ny = 2", "x = 1", 1.0),  # the first line that is not empty
        ("```python\n# one\n// two\nx = 1", "x = 1", 1.0),
        ("abcd", "bcde", 0.75),  # 2 * 3 / 8
        ("abc", "abd", 0.67),  # 2 * 2 / 6, rounded
        ("abc", "xyz", 0.0),
        ("# only a comment", "x = 1", 0.0),
        ("", "", 1.0),
        ("ab", "", 0.0),
    ],
)
def test_code(prediction: str, answer: str, expected: float) -> None:
    assert module.code_similarity(prediction, answer) == expected


def test_best_answer_and_first_line() -> None:
    assert longbench_score("qasper", "Bob", ["Bob Dylan", "Bob", "Dylan"]) == 1.0
    assert longbench_score("triviaqa", "\n\nBob\nQuestion: who else?", ["Bob"]) == 1.0
    assert longbench_score("qasper", "Bob\nquestion", ["Bob"]) == pytest.approx(2 / 3)
    assert longbench_score("trec", "Food\nDate", ["Food"], ["Food", "Date"]) == 1.0
    with pytest.raises(ValueError, match="trec needs classes"):
        longbench_score("trec", "Food", ["Food"])
    with pytest.raises(ValueError, match="at least one right answer"):
        longbench_score("qasper", "Bob", [])


def test_every_task_has_its_metric() -> None:
    """The table of the paper: F1, ROUGE-L, accuracy and edit similarity."""
    names = module.LONGBENCH_METRICS
    assert len(names) == 21
    assert set(names.values()) == set(module.METRICS)
    assert [name for name in names if names[name].startswith("rouge_l")] == [
        "dureader",
        "gov_report",
        "qmsum",
        "multi_news",
        "vcsum",
        "samsum",
    ]


def test_evaluate_loads_the_file_without_a_hub(tmp_path: Path) -> None:
    metric = evaluate.load(module.__file__, "qasper", cache_dir=str(tmp_path))
    metric.add_batch(predictions=["It was Bob.", "Ann"], references=[["Bob", "Bob Dylan"], ["Ann"]])
    assert metric.compute() == {"score": pytest.approx(75)}
    classes = LongBench("trec", keep_in_memory=True)
    found = classes.compute(predictions=["Food or Date"], references=[["Food"]], classes=["Food", "Date"])
    assert found == {"score": 50.0}


@pytest.mark.parametrize("name", [None, "qaspr"])
def test_unknown_metrics_are_refused(name: str | None) -> None:
    with pytest.raises(ValueError, match=rf"one of narrativeqa, qasper, .*, got {name!r}"):
        LongBench(name)


def test_without_jieba_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    assert longbench_score("qasper", "b", ["b"]) == 1.0
    with pytest.raises(ImportError, match=r'need jieba: pip install "patchattn\[eval\]"'):
        longbench_score("vcsum", "b", ["b"])
