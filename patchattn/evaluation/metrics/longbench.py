"""The official metrics of LongBench's tasks (arXiv 2308.14508, Table 1) as a module of the `evaluate` library.

    LongBench("qasper").compute(predictions=["It was Bob."], references=[["Bob", "Bob Dylan"]])  # {'score': 50.0}

`evaluate.load(path_of_this_file, "qasper")` gives the same object; nothing is fetched for it. That is why this file
stands alone: `evaluate` copies it. Chinese texts are cut into words by `jieba`.
"""

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

try:
    import datasets
    import evaluate
except ImportError as error:
    raise ImportError(f'The metrics of LongBench need {error.name}: pip install "patchattn[eval]"') from error

# what the official normalisation of Chinese takes for punctuation beside ASCII's
_CHINESE_PUNCTUATION = (
    "\uff01\uff1f\uff61\u3002\uff02\uff03\uff04\uff05\uff06\uff07\uff08\uff09\uff0a\uff0b\uff0c\uff0d\uff0f\uff1a"
    "\uff1b\uff1c\uff1d\uff1e\uff20\uff3b\uff3c\uff3d\uff3e\uff3f\uff40\uff5b\uff5c\uff5d\uff5e\uff5f\uff60\uff62"
    "\uff63\uff64\u3001\u3003\u300b\u300c\u300d\u300e\u300f\u3010\u3011\u3014\u3015\u3016\u3017\u3018\u3019\u301a"
    "\u301b\u301c\u301d\u301e\u301f\u3030\u303e\u303f\u2013\u2014\u2018\u2019\u201b\u201c\u201d\u201e\u201f\u2026"
    "\u2027\ufe4f"
)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NO_CHINESE_PUNCTUATION = str.maketrans("", "", string.punctuation + _CHINESE_PUNCTUATION)


def english_words(text: str) -> list[str]:
    """Words in lower case, without punctuation and the articles a, an, the."""
    return re.sub(r"\b(?:a|an|the)\b", " ", text.lower().translate(_NO_PUNCTUATION)).split()


def chinese_words(text: str) -> list[str]:
    """Words as `jieba` cuts them, in lower case, without punctuation and white space."""
    words = ("".join(word.lower().translate(_NO_CHINESE_PUNCTUATION).split()) for word in _cut(text))
    return [word for word in words if word]


def _cut(text: str) -> list[str]:
    try:
        import jieba
    except ImportError as error:
        raise ImportError('LongBench\'s Chinese tasks need jieba: pip install "patchattn[eval]"') from error
    return jieba.lcut(text)


def _f1(hits: int, said: int, right: int) -> float:
    """Harmonic mean of precision and recall."""
    return 2 * hits / (said + right) if hits else 0.0


def word_f1(prediction: str, answer: str, words: Callable[[str], list[str]] = english_words) -> float:
    """F1 of the words, each counted as often as it occurs, in any order."""
    said, right = words(prediction), words(answer)
    return _f1((Counter(said) & Counter(right)).total(), len(said), len(right))


def word_f1_zh(prediction: str, answer: str) -> float:
    """F1 of Chinese words."""
    return word_f1(prediction, answer, chinese_words)


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L of summaries as the `rouge` package, which LongBench uses, computes it.

    Sentences end at full stops. For each sentence of the answer and each of the prediction, the words of a longest
    common subsequence are taken; the hits are the different words among all of them. Precision and recall divide by the
    numbers of different words. A text without sentences scores 0.
    """
    said, right = _sentences(prediction), _sentences(answer)
    hits = {word for one in right for other in said for word in _common_subsequence(one, other)}
    return _f1(len(hits), len({word for one in said for word in one}), len({word for one in right for word in one}))


def rouge_l_zh(prediction: str, answer: str) -> float:
    """ROUGE-L of Chinese summaries, cut into words; full stops are still the English ones."""
    return rouge_l(" ".join(_cut(prediction)), " ".join(_cut(answer)))


def _sentences(text: str) -> list[list[str]]:
    """Words by sentence; white space between full stops is a sentence of one empty word, as in the `rouge` package."""
    return [part.split() or [""] for part in text.split(".") if part]


def _common_subsequence(left: Sequence[str], right: Sequence[str]) -> list[str]:
    """The words of a longest common subsequence; of several, the one that the `rouge` package takes."""
    lengths = [[0] * (len(right) + 1)]
    for word in left:
        row = [0]
        for j, other in enumerate(right):
            row.append(lengths[-1][j] + 1 if word == other else max(lengths[-1][j + 1], row[j]))
        lengths.append(row)
    found = []
    i, j = len(left), len(right)
    while i and j:
        if left[i - 1] == right[j - 1]:
            found.append(left[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 divided by the number of classes that the prediction names, if the right one is among them; else 0.

    Names that are part of the right one do not count.
    """
    named = [name for name in classes if name in prediction and (name == answer or name not in answer)]
    return 1 / len(named) if answer in named else 0.0


def count(prediction: str, answer: str) -> float:
    """Share of the prediction's numbers that are the right one."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str) -> float:
    """Share of the prediction's numbers that are the paragraph's, such as 3 of "Paragraph 3" or "段落3".

    Raises:
        ValueError: the answer names no paragraph.
    """
    paragraph = re.search(r"(?:Paragraph |段落)(\d+)", answer)
    if paragraph is None:
        raise ValueError(f"The answer must name a paragraph, such as 'Paragraph 3' or '段落3', got {answer!r}.")
    return count(prediction, paragraph[1])


def code_similarity(prediction: str, answer: str) -> float:
    """Likeness of the first line of code, `difflib`'s ratio rounded to hundredths as `fuzzywuzzy` does.

    Lines with a backtick, `#` or `//` are skipped as marks of a block or comments. An empty line is like nothing.
    """
    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not re.search(r"`|#|//", line)), "")
    if not code or not answer:
        return float(code == answer)
    return round(100 * difflib.SequenceMatcher(None, code, answer).ratio()) / 100


METRICS: dict[str, Callable[..., float]] = {
    "word_f1": word_f1,
    "word_f1_zh": word_f1_zh,
    "rouge_l": rouge_l,
    "rouge_l_zh": rouge_l_zh,
    "classification": classification,
    "count": count,
    "retrieval": retrieval,
    "code_similarity": code_similarity,
}

LONGBENCH_METRICS = {
    "narrativeqa": "word_f1",
    "qasper": "word_f1",
    "multifieldqa_en": "word_f1",
    "multifieldqa_zh": "word_f1_zh",
    "hotpotqa": "word_f1",
    "2wikimqa": "word_f1",
    "musique": "word_f1",
    "dureader": "rouge_l_zh",
    "gov_report": "rouge_l",
    "qmsum": "rouge_l",
    "multi_news": "rouge_l",
    "vcsum": "rouge_l_zh",
    "trec": "classification",
    "triviaqa": "word_f1",
    "samsum": "rouge_l",
    "lsht": "classification",
    "passage_count": "count",
    "passage_retrieval_en": "retrieval",
    "passage_retrieval_zh": "retrieval",
    "lcc": "code_similarity",
    "repobench-p": "code_similarity",
}

# models go on with the next example of these prompts; only the first line is the answer
FIRST_LINE = frozenset({"trec", "triviaqa", "samsum", "lsht"})


def longbench_score(task: str, prediction: str, answers: Sequence[str], classes: Sequence[str] | None = None) -> float:
    """What one prediction is worth: its best score against any of the answers, from 0 to 1.

    Args:
        task: such as `qasper`.
        prediction: as the model wrote it.
        answers: right ones.
        classes: all class names, for `trec` and `lsht`.

    Raises:
        ValueError: no answers, no classes where the task needs them, or no paragraph in an answer that must name one.
        ImportError: a Chinese task without `jieba`.
    """
    if not answers:
        raise ValueError(f"{task} needs at least one right answer per prediction.")
    more: dict[str, Any] = {}
    if LONGBENCH_METRICS[task] == "classification":
        if not classes:
            raise ValueError(f"{task} needs classes, the names of all of them.")
        more["classes"] = classes
    if task in FIRST_LINE:
        prediction = prediction.lstrip("\n").split("\n")[0]
    return max(METRICS[LONGBENCH_METRICS[task]](prediction, answer, **more) for answer in answers)


class LongBench(evaluate.Metric):
    """The official metric of one task; `compute` takes `classes=` for `trec` and `lsht`, and gives a `score` to 100.

    Args:
        config_name: the task, such as `qasper`.
        kwargs: of `evaluate.Metric`, such as `keep_in_memory`.

    Raises:
        ValueError: no such task.
    """

    def __init__(self, config_name: str | None = None, **kwargs: Any) -> None:
        if config_name not in LONGBENCH_METRICS:
            known = ", ".join(LONGBENCH_METRICS)
            raise ValueError(f"LongBench needs the name of a task, one of {known}, got {config_name!r}.")
        super().__init__(config_name=config_name, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="The official metrics of the tasks of LongBench, from 0 to 100.",
            citation="Bai et al.: LongBench. A Bilingual, Multitask Benchmark for Long Context Understanding, 2023.",
            inputs_description="predictions: answers as the model wrote them. references: lists of right answers.",
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
            reference_urls=["https://arxiv.org/abs/2308.14508"],
        )

    def _compute(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], classes: Sequence[str] | None = None
    ) -> dict[str, float]:
        scores = [
            longbench_score(self.config_name, prediction, answers, classes)
            for prediction, answers in zip(predictions, references, strict=True)
        ]
        return {"score": 100 * sum(scores) / len(scores)}
