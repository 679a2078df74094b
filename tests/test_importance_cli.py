"""`patchattn calibrate heads`: texts from files, what each kind of model gets of them, and the command itself."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
)

import patchattn
from patchattn.calibration.data import TextExample, class_numbers, make_batches, read_texts, task_of
from patchattn.cli import main as cli
from patchattn.core.importance import HeadImportance
from patchattn.inspection.head_importance import head_importance

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]


def tokenizer() -> PreTrainedTokenizerFast:
    """A word a letter."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *"abcdefghijklmnopqrstuvwxyz"])}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def config(**extra: Any) -> BertConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertConfig(vocab_size=40, max_position_embeddings=64, **sizes, **extra)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command; returns exit code, stdout and stderr."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["calibrate", "heads", *map(str, arguments)])
        return int(ended.value.code or 0), *capsys.readouterr()

    return call


def test_texts_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one text\nof two lines")
    (tmp_path / "b.jsonl").write_text('{"text": "x", "label": 1}\n\n{"sentence1": "y", "sentence2": "z"}\n')
    (tmp_path / "c.tsv").write_text('sentence\tlabel\na "quoted\t0\nb\tgood\n')
    (tmp_path / "notes.md").write_text("no data")
    assert read_texts(tmp_path) == [
        TextExample("one text\nof two lines"),
        TextExample("x", None, 1),
        TextExample("y", "z"),
        TextExample('a "quoted', None, 0),
        TextExample("b", None, "good"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", " ", "holds no text"),
        ("a.csv", "x", "expected a file of the kinds"),
        ("a.jsonl", '{"text": "x"}\n{', "line 2: not valid JSON"),
        ("a.jsonl", '{"txt": "x"}', "line 1 must have a text named text or sentence"),
        ("a.jsonl", '{"text": "x", "label": 0.5}', "line 1: a label"),
        ("a.jsonl", "[1]", "line 1 must have"),
        ("a.tsv", "text\tlabel\nx\n", "line 2: expected 2 columns"),
        ("a.tsv", "text\n", "holds no text"),
    ],
)
def test_broken_texts(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path / name)


def test_texts_that_are_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file"):
        read_texts(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match="holds no file"):
        read_texts(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="UTF-8"):
        read_texts(tmp_path / "a.txt")


def test_rows_of_a_causal_language_model() -> None:
    texts = [TextExample("a b c d e f g"), TextExample("a"), TextExample("h i")]
    (first, second) = make_batches(tokenizer(), texts, "causal", length=5, batch_size=3)
    rows = [[1, 5, 6, 7, 8], [9, 10, 11, 2, 0], [1, 5, 2, 0, 0]]
    assert first["input_ids"].tolist() == rows
    assert first["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
    assert second["input_ids"].tolist() == [[1, 12, 13, 2]]
    assert len(make_batches(tokenizer(), texts, "causal", length=5, samples=2)[0]["input_ids"]) == 2


def test_rows_of_a_classifier() -> None:
    texts = [TextExample("a b c", "d", "good"), TextExample("a", "b", 0)]
    described = config(id2label={0: "bad", 1: "good"})
    labels = class_numbers(texts, described)
    assert labels == [1, 0]
    (batch,) = make_batches(tokenizer(), texts, "classify", labels=labels)
    assert batch["input_ids"].tolist() == [[1, 5, 6, 7, 2, 8, 2], [1, 5, 2, 6, 2, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]
    for label in (None, 2, "fine"):
        with pytest.raises(ValueError, match="labels from 0 to 1, or of bad, good"):
            class_numbers([TextExample("a", None, label)], described)


def test_rows_of_a_masked_language_model() -> None:
    letters = " ".join("abcdefghij" * 20)
    (batch,) = make_batches(tokenizer(), [TextExample(letters)], "masked", length=22, batch_size=16)
    tokens, labels = batch["input_ids"], batch["labels"]
    masked = tokens == 3
    assert torch.equal(masked, labels != -100)
    assert 0.08 < masked.sum() / 200 < 0.22
    whole = torch.where(masked, labels, tokens)
    assert whole.tolist() == [[1, *[5 + i for i in range(10)] * 2, 2]] * 10
    (again,) = make_batches(tokenizer(), [TextExample(letters)], "masked", length=22, batch_size=16)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert "labels" not in make_batches(tokenizer(), [TextExample(letters)], "none", length=22)[0]
    with pytest.raises(ValueError, match="single row of two tokens"):
        make_batches(tokenizer(), [TextExample("a")], "causal", length=1)


def test_what_a_model_is_for() -> None:
    assert task_of(config(architectures=["BertForMaskedLM"])) == "masked"
    assert task_of(config(architectures=["BertForSequenceClassification"])) == "classify"
    assert task_of(config(architectures=["BertModel"])) == task_of(config()) == "none"
    assert task_of(LlamaConfig(architectures=["LlamaForCausalLM"])) == "causal"
    with pytest.raises(NotImplementedError, match="two sequences"):
        task_of(T5Config(architectures=["T5ForConditionalGeneration"]))


@pytest.mark.parametrize("kind", ["classify", "masked", "none", "causal"])
def test_the_command_scores_every_kind_of_model(kind: str, command: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = {
        "classify": lambda: BertForSequenceClassification(config()),
        "masked": lambda: BertForMaskedLM(config()),
        "none": lambda: BertModel(config()),
        "causal": lambda: LlamaForCausalLM(
            LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=40)
        ),
    }[kind]().eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    rows = [(" ".join("hello"), 0), (" ".join("goodbye"), 1), (" ".join("patch"), 1)]
    (tmp_path / "data.tsv").write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    method = "flap" if kind == "none" else "michel"
    arguments = [tmp_path / "model", "--data", tmp_path / "data.tsv", "--method", method, "--batch-size", 2]
    code, out, err = command(*arguments, "--out", tmp_path / "scores.json", "--plot", tmp_path / "heads.png")
    assert code == 0, err
    assert "8 heads scored on 23 tokens" in out
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "scores.json.state").exists()
    found = HeadImportance.load(tmp_path / "scores.json")
    labels = [label for _, label in rows] if kind == "classify" else None
    texts = [TextExample(text) for text, _ in rows]
    batches = make_batches(tokenizer(), texts, kind, labels=labels, batch_size=2)  # type: ignore[arg-type]
    expected = head_importance(model, batches, method)
    assert found.base.name == "model"
    for name, scores in expected.scores.items():
        assert found.scores[name] == pytest.approx(scores, rel=1e-4, abs=1e-6)


def test_a_killed_command_goes_on(
    command: Any, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("Once upon a time, there was a little girl. She liked to play in the park. " * 20)
    arguments = [data_dir / "models" / "stories260K", "--data", tmp_path / "a.txt", "--length", 64]
    arguments += ["--batch-size", 2, "--method", "flap"]
    assert command(*arguments, "--output", tmp_path / "whole.json")[0] == 0
    original = LlamaForCausalLM.forward
    calls: list[int] = []

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise OSError("no more power")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", killed)
    code, _, err = command(*arguments, "--output", tmp_path / "parts.json")
    assert (code, "no more power" in err) == (2, True)
    assert (tmp_path / "parts.json.state").exists()
    code, out, _ = command(*arguments, "--output", tmp_path / "parts.json")
    assert code == 0
    assert "Going on from" in out
    assert json.loads((tmp_path / "parts.json").read_text()) == json.loads((tmp_path / "whole.json").read_text())
    model = LlamaForCausalLM.from_pretrained(data_dir / "models" / "stories260K")
    patchattn.patch_model(model, "prune", sparsity=0.25, importance=str(tmp_path / "whole.json"), physical=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--method", "michell"], "did you mean 'michel'"),
        (["nowhere"], "michel needs --data"),
        (["nowhere", "--data", "DATA", "--method", "random"], "leave out --data"),
        (["nowhere", "--data", "DATA", "--metric", "wifv"], "'michel' takes per, loss, got metric"),
        (["nowhere", "--data", "nothing.txt"], "There is no file 'nothing.txt'"),
        (["nowhere", "--data", "DATA"], "Cannot load 'nowhere'"),
        (["ENCODER", "--data", "DATA"], "michel needs a loss"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(
    arguments: list[str], message: str, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "data.txt").write_text("a b c")
    config(architectures=["BertModel"]).save_pretrained(tmp_path / "encoder")  # and no weights
    places = {"DATA": "data.txt", "ENCODER": "encoder"}
    code, _, err = command(*[places.get(argument, argument) for argument in arguments])
    assert code == 2
    assert message in err


def test_what_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[1] / "docs" / "importance.md"
    (block,) = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)).eval()
    batches = [{"input_ids": torch.arange(20).view(2, 10)}]
    exec(compile(block, str(page), "exec"), {"model": model, "batches": batches})
    assert sum(site["query_heads"] for site in patchattn.patch_info(model)["sites"]) == 6


def test_the_command_draws_a_curve(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("Once upon a time, there was a little girl. She liked to play in the park.")
    arguments = ["calibrate", "curve", data_dir / "models" / "stories260K", "--data", "a.txt", "--test", "a.txt"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*map(str, arguments), "--every", "10", "--until", "0.5", "--plot", "curve.png"])
    assert not ended.value.code
    assert "perplexity" in capsys.readouterr().out
    rows = (tmp_path / "curve.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["removed", "0", "10", "20"]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
