"""GLUE as tasks: rows of files, a classifier's classes, likelihoods of answers, and official scores."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaForCausalLM, PreTrainedTokenizerFast

from patchattn.evaluation.tasks.glue_tasks import LABEL_NAMES, PROMPTS, GlueClassification, GlueLikelihood, label_order

from .test_longbench import BYTES, tiny_model

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "film", "no"]


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Validation rows alone: nothing else is needed."""
    files = {
        "SST-2/dev.tsv": "sentence\tlabel\na good film\t1\nbad\t0\nno film\t0\n",
        "STS-B/dev.tsv": "sentence1\tsentence2\tscore\na\tfilm\t0.5\ngood\tgood\t5.0\nbad\tno good\t3.5\n",
        "RTE/dev.tsv": "sentence1\tsentence2\tlabel\na good film\ta film\tentailment\nbad\tgood\tnot_entailment\n",
        "MRPC/msr_paraphrase_test.txt": "Quality\t#1 String\t#2 String\n1\tgood\tgood film\n0\tbad\tfilm\n",
        "CoLA/dev.tsv": "x\t1\t\tA film.\n",
        "CoLA/dev_ood.tsv": "y\t0\t*\tFilm a.\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for task, labels in (("QNLI", "entailment"), ("QQP", "1"), ("MNLI", "neutral")):
        (tmp_path / task).mkdir()
        rows = {"0": {"text_a": "Is it good?", "text_b": "It is.", "label": labels}}
        (tmp_path / task / "dev.json").write_text(json.dumps(rows))
    (tmp_path / "WNLI").mkdir()
    (tmp_path / "WNLI" / "dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\tIt fell.\tThe film fell.\t1\n")
    return str(tmp_path)


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    fast = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, unk_token="[UNK]", pad_token="[PAD]", model_input_names=inputs
    )


def classifier(labels: int, **config: Any) -> BertForSequenceClassification:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    torch.manual_seed(0)
    config = BertConfig(**sizes, vocab_size=len(WORDS), num_labels=labels, initializer_range=0.5, **config)
    return BertForSequenceClassification(config).eval()


def test_every_task_has_a_prompt_and_names(data: str) -> None:
    for name, (template, answers) in PROMPTS.items():
        task = GlueLikelihood(name, data=data)
        assert len(answers) == (len(task.task.labels) or 6)
        assert ("{second}" in template) == (len(task.task.texts) == 2)
        assert len(LABEL_NAMES.get(name, ())) == len(task.task.labels)
        assert len(task) == (3 if name in ("sst2", "stsb") else 2 if name in ("rte", "mrpc", "cola") else 1)
    assert set(PROMPTS) == {"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"}


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["LABEL_0", "LABEL_1", "LABEL_2"], [0, 1, 2]),
        (["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], [2, 1, 0]),
        (["entailment", "contradiction", "neutral"], [0, 2, 1]),
    ],
)
def test_classes_are_told_by_their_names(names: list[str], order: list[int]) -> None:
    config = SimpleNamespace(num_labels=3, id2label=dict(enumerate(names)))
    assert label_order("mnli", config) == order
    with pytest.raises(ValueError, match="glue/rte needs 2 classes, got 3"):
        label_order("rte", config)
    with pytest.raises(ValueError, match="glue/stsb needs 1 class, got 3"):
        label_order("stsb", config)
    with pytest.raises(ValueError, match="calls its classes x, y, z, expected entailment, neutral, contradiction"):
        label_order("mnli", SimpleNamespace(num_labels=3, id2label=dict(enumerate("xyz"))))
    assert label_order("rte", SimpleNamespace(num_labels=2, id2label={0: "not entailment", 1: "Entailment"})) == [1, 0]


def test_a_classifier(data: str) -> None:
    """Its classes are swapped; each row as if it were alone."""
    model, tokenizer = classifier(2, id2label={0: "POSITIVE", 1: "NEGATIVE"}), encoder_tokenizer()
    task = GlueClassification("sst2", data=data)
    task.check_model(model, tokenizer)
    rows = task.answer(model, tokenizer, [0, 1, 2])
    for row, text, label in zip(rows, ("a good film", "bad", "no film"), (1, 0, 0), strict=True):
        ids = torch.tensor([[2, *(WORDS.index(word) for word in text.split()), 3]])
        with torch.no_grad():
            expected = 1 - int(model(ids).logits.argmax())
        assert (row["prediction"], row["label"], row["prompt_tokens"]) == (expected, label, ids.shape[1])
        assert row["seconds"] > 0
    cut = GlueClassification("sst2", data=data, max_length=8)
    assert cut.identity() != task.identity()
    with pytest.raises(ValueError, match="has 64 positions, less than max_length=128"):
        task.check_model(classifier(2, max_position_embeddings=64), tokenizer)


def test_a_regression(data: str) -> None:
    model, tokenizer = classifier(1), encoder_tokenizer()
    rows = GlueClassification("stsb", data=data).answer(model, tokenizer, [1])
    ids = torch.tensor([[2, WORDS.index("good"), 3, WORDS.index("good"), 3]])
    with torch.no_grad():
        expected = model(ids, token_type_ids=torch.tensor([[0, 0, 0, 1, 1]])).logits.item()
    assert rows[0]["prediction"] == pytest.approx(expected, rel=1e-4)
    assert rows[0]["label"] == 5.0


def log_likelihoods(model: LlamaForCausalLM, prompt: str, answers: tuple[str, ...]) -> np.ndarray:
    """Of a byte tokenizer's answers, one at a time, in float64."""
    start, found = len(BYTES(prompt)["input_ids"]), []
    for answer in answers:
        ids = torch.tensor([BYTES(prompt + answer)["input_ids"]])
        with torch.no_grad():
            log_p = model(ids).logits[0].double().log_softmax(-1)
        found.append(sum(float(log_p[place - 1, ids[0, place]]) for place in range(start, ids.shape[1])))
    return np.array(found)


def test_a_language_model(data: str) -> None:
    model = tiny_model()
    task = GlueLikelihood("sst2", data=data)
    task.check_model(model, BYTES)
    for row, text in zip(task.answer(model, BYTES, [0, 1, 2]), ("a good film", "bad", "no film"), strict=True):
        prompt = f"{text}\nQuestion: Is this review negative or positive?\nAnswer:"
        assert row["prediction"] == log_likelihoods(model, prompt, (" negative", " positive")).argmax()
        assert not row["truncated"]
        assert row["prompt_tokens"] == 1 + len(prompt)


def test_scores_of_similarity_by_likelihood(data: str) -> None:
    model = tiny_model()
    (row,) = GlueLikelihood("stsb", data=data).answer(model, BYTES, [2])
    prompt = (
        "Sentence 1: bad\nSentence 2: no good\n"
        "Question: How similar are they, from 0 (unrelated) to 5 (same meaning)?\nAnswer:"
    )
    scores = log_likelihoods(model, prompt, tuple(f" {number}" for number in range(6)))
    weights = np.exp(scores) / np.exp(scores).sum()
    assert row["prediction"] == pytest.approx((weights * np.arange(6)).sum(), rel=1e-5)


def test_prompts_that_are_too_long_lose_their_middle(data: str, tmp_path: Path) -> None:
    (tmp_path / "SST-2" / "dev.tsv").write_text(f"sentence\tlabel\n{'a good film ' * 20}\t1\n")
    model = tiny_model()  # with 160 positions, of which the answers take 10
    (row,) = GlueLikelihood("sst2", data=data).answer(model, BYTES, [0])
    assert row["truncated"]
    assert row["prompt_tokens"] == 150


def test_official_scores(data: str) -> None:
    def scores(name: str, given: list[Any], right: list[Any]) -> dict[str, float]:
        rows = [{"prediction": a, "label": b} for a, b in zip(given, right, strict=True)]
        task = GlueLikelihood(name, data=data)
        found = task.score(rows)
        assert task.main_score in found
        return found

    assert scores("sst2", [1, 0, 1, 1], [1, 0, 0, 1]) == {"accuracy": 75.0}
    # two of three positives found, and one of three named is wrong: precision and recall 2/3
    expected = {"accuracy": 50.0, "f1": 100 * 2 / 3, "mean": (50 + 100 * 2 / 3) / 2}
    assert scores("mrpc", [1, 1, 1, 0], [1, 1, 0, 1]) == pytest.approx(expected)
    assert scores("cola", [1, 1, 0, 0], [1, 0, 0, 1]) == pytest.approx({"matthews_correlation": 0.0})
    found = scores("stsb", [1.0, 2.0, 4.0], [0.0, 1.0, 2.0])
    pearson = 100 * np.corrcoef([1, 2, 4], [0, 1, 2])[0, 1]
    assert found == pytest.approx({"pearson": pearson, "spearmanr": 100.0, "mean": (100 + pearson) / 2})


def test_what_is_refused(data: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no task 'sst3'; did you mean 'sst2'"):
        GlueLikelihood("sst3", data=data)
    with pytest.raises(ValueError, match="There is no file"):
        GlueLikelihood("sst2", data=str(tmp_path / "nowhere"))
    (tmp_path / "SST-2" / "dev.tsv").write_text("sentence\tlabel\na good film\t2\n")
    with pytest.raises(ValueError, match="line 2: the label must be 0 or 1, got '2'"):
        GlueClassification("sst2", data=data)
    tokenizer = encoder_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        GlueClassification("rte", data=data).check_model(classifier(2), tokenizer)


def test_the_identity_is_that_of_the_rows_and_not_of_their_place(data: str, tmp_path: Path) -> None:
    task = GlueLikelihood("rte", data=data)
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "RTE").rename(moved / "RTE")
    assert GlueLikelihood("rte", data=str(moved)).identity() == task.identity()
    (moved / "RTE" / "dev.tsv").write_text("sentence1\tsentence2\tlabel\na\tb\tentailment\n")
    assert GlueLikelihood("rte", data=str(moved)).identity() != task.identity()
