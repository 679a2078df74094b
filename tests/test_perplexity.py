"""Perplexity by a sliding window against losses token by token, and the loss by position."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import patchattn
from patchattn.evaluation.tasks.figures import plot_positions
from patchattn.evaluation.tasks.perplexity import PerplexityTask, PositionLoss, position_losses, wikitext, windows

from .long_context import BYTES, tiny_llama

TEXT = "The rain in Spain stays mainly, s\u00ed, in the plain. Is it so? It is."


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    return str(tmp_path / "a.txt")


def loss(model: Any, context: list[int], token: int) -> float:
    """Of one token behind others, in float64 from the logits on."""
    with torch.no_grad():
        logits = model(torch.tensor([context])).logits[0, -1].double().numpy()
    return float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[token])


def run(task: PerplexityTask, model: Any, batch: int) -> list[dict[str, Any]]:
    starts = range(0, len(task), batch)
    return [row for start in starts for row in task.answer(model, BYTES, range(start, min(start + batch, len(task))))]


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.integers(2, 80), st.integers(2, 40), st.data())
def test_every_token_is_scored_once(tokens: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length - 1))
    found = list(windows(tokens, length, stride))
    scored = [place for window in found for place in range(window.first, window.end)]
    assert scored == list(range(1, tokens))
    for number, window in enumerate(found):
        assert window.start == number * stride
        assert window.end == min(window.start + length, tokens)
        assert window.first - window.start >= (length - stride if number else 1)


@pytest.mark.parametrize(("length", "stride"), [(16, 8), (16, 15), (20, 7), (9, 1), (500, 100)])
def test_token_by_token(path: str, length: int, stride: int) -> None:
    """Every token in the first window that holds it, with all of the window that comes before it."""
    model = tiny_llama(max_position_embeddings=512).double()
    tokens = BYTES(TEXT)["input_ids"]
    losses = []
    for place in range(1, len(tokens)):
        start = next(start for start in range(0, len(tokens), stride) if start + length > place)
        losses.append(loss(model, tokens[start:place], tokens[place]))
    task = PerplexityTask(data=path, max_length=length, stride=stride, parts=3, buckets=2)
    task.check_model(model, BYTES)
    rows = run(task, model, 2)
    assert json.loads(json.dumps(rows)) == rows
    assert sum(row["tokens"] for row in rows) == len(tokens) - 1
    scores = task.score(rows)
    assert scores["nats_per_token"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert scores["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-6)
    assert scores["bits_per_byte"] == pytest.approx(sum(losses) / math.log(2) / len(TEXT.encode()), rel=1e-6)
    assert task.main_score in scores
    assert not task.higher_is_better


@pytest.mark.parametrize(("buckets", "edges"), [(1, [(1, 15)]), (4, [(1, 3), (4, 7), (8, 11), (12, 15)]), (15, None)])
def test_positions(path: str, buckets: int, edges: list[tuple[int, int]] | None) -> None:
    """All tokens of all windows, by the number of tokens before them in the window."""
    model = tiny_llama().double()
    tokens = BYTES(TEXT)["input_ids"]
    by_position: dict[int, list[float]] = {}
    for start in range(0, len(tokens) - 16 + 8, 8):
        for place in range(start + 1, min(start + 16, len(tokens))):
            by_position.setdefault(place - start, []).append(loss(model, tokens[start:place], tokens[place]))
    task = PerplexityTask(data=path, max_length=16, stride=8, buckets=buckets, parts=2)
    rows = run(task, model, 2)
    found = position_losses(rows)
    assert [(part.first, part.last) for part in found] == (edges or [(place, place) for place in range(1, 16)])
    for part in found:
        losses = [value for place in range(part.first, part.last + 1) for value in by_position[place]]
        assert part.tokens == len(losses)
        assert part.nats == pytest.approx(np.mean(losses), rel=1e-6)
        assert task.score(rows)[f"nats_per_token@{part.first}-{part.last}"] == part.nats


def test_parts_and_batches_do_not_matter(path: str) -> None:
    """Also with more parts than windows, whose rows are empty, and with a last window that is shorter."""
    model, found = tiny_llama(), []
    for parts, batch in ((1, 1), (4, 3), (40, 7), (40, 40)):
        task = PerplexityTask(data=path, max_length=16, stride=5, parts=parts)
        assert len(task) == parts
        rows = run(task, model, batch)
        assert sum(row["bytes"] for row in rows) == len(TEXT.encode())
        found.append(task.score(rows))
    for scores in found[1:]:
        assert scores == pytest.approx(found[0], rel=1e-6)
    with pytest.raises(ValueError, match="None of the 1 parts answered has a window"):
        task.score(rows[:1])


def test_long_windows_are_turned_into_losses_in_pieces(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab c" * 100)
    model, task = tiny_llama(), PerplexityTask(data=str(tmp_path), max_length=390, stride=200, parts=1)
    (row,) = task.answer(model, BYTES, [0])
    tokens = torch.tensor([BYTES("ab c" * 100)["input_ids"]])
    with torch.no_grad():  # windows of 0 to 390 and of 200 to 401
        first, second = model(tokens[:, :390]).logits[0], model(tokens[:, 200:]).logits[0]
    logits = torch.cat([first[:-1], second[390 - 201 : -1]]).double().log_softmax(-1)
    expected = -logits.gather(-1, tokens[0, 1:, None]).sum()
    assert row["nll"] == pytest.approx(float(expected), rel=1e-6)


def test_default_windows(path: str) -> None:
    """As long as the model's positions, at most 1024, and moved by half of that."""
    for positions, expected in ((32, 32), (4096, 1024)):
        (row,) = PerplexityTask(data=path, parts=1, buckets=1).answer(
            tiny_llama(max_position_embeddings=positions), BYTES, [0]
        )
        assert row["max_length"] == expected
        given = {"max_length": expected, "stride": expected // 2}
        (same,) = PerplexityTask(data=path, parts=1, buckets=1, **given).answer(
            tiny_llama(max_position_embeddings=positions), BYTES, [0]
        )
        assert row["nll"] == same["nll"]


def test_stories260k(data_dir: Path, tmp_path: Path) -> None:
    """A story is far more likely to it than the same words in another order."""
    folder = data_dir / "models/stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. " * 20
    found = []
    for name, text in (("story", story), ("mixed", " ".join(reversed(story.split())))):
        (tmp_path / f"{name}.txt").write_text(text)
        task = PerplexityTask(data=str(tmp_path / f"{name}.txt"), max_length=128, parts=2)
        task.check_model(model, tokenizer)
        found.append(task.score(task.answer(model, tokenizer, [0, 1]))["perplexity"])
    assert 1 < found[0] < found[1]


def test_wikitext(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*names: str, split: str) -> dict[str, list[str]]:
        calls.append((*names, split))
        return {"text": ["", " = A = \n", "b"]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert wikitext() == "\n\n = A = \n\n\nb"
    assert calls == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test")]
    task = PerplexityTask()
    assert task.identity() == PerplexityTask().identity()

    def offline(*names: str, split: str) -> None:
        raise ConnectionError("no route.\nmore")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    with pytest.raises(ValueError, match=r"cannot be loaded from the Hub \(no route\). Give data, a text file"):
        PerplexityTask()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install"):
        PerplexityTask()


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"max_length": 8, "stride": 8}, ValueError, "stride must be below max_length, 8"),
        ({"max_length": 1}, ValueError, "max_length must lie between 2"),
        ({"buckets": 0}, ValueError, "buckets must lie between 1"),
        ({"strides": 4}, ValueError, "did you mean 'stride'"),
        ({"parts": 1.5}, TypeError, "parts must be"),
        ({"data": "no/such.txt"}, ValueError, "There is no text in"),
    ],
)
def test_settings_that_are_refused(path: str, wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PerplexityTask(**{"data": path, **wrong})


def test_models_that_are_refused(path: str, tmp_path: Path) -> None:
    small = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=300, n_positions=64))
    PerplexityTask(data=path, max_length=64).check_model(small, BYTES)
    with pytest.raises(ValueError, match="has a table of 64 positions"):
        PerplexityTask(data=path, max_length=65).check_model(small, BYTES)
    with pytest.raises(ValueError, match="stride must be below the length of the window, 64, got 64"):
        PerplexityTask(data=path, stride=64).check_model(small, BYTES)
    with pytest.raises(ValueError, match="buckets must be below"):
        PerplexityTask(data=path, buckets=64).check_model(small, BYTES)
    (tmp_path / "short.txt").write_text("x")
    task = PerplexityTask(data=str(tmp_path / "short.txt"))
    with pytest.raises(ValueError, match="fewer than two tokens"):
        task.check_model(small, lambda text, verbose: {"input_ids": [5]})


def test_a_variant_that_looks_ahead_is_refused(path: str) -> None:
    model, task = tiny_llama(), PerplexityTask(data=path, max_length=16)
    with patchattn.patched(model, "logn", train_length=8):
        task.check_model(model, BYTES)
    with (
        patchattn.patched(model, "act", heads={0: [0]}),
        pytest.raises(ValueError, match="Under 'act' the rows of one forward depend on later ones"),
    ):
        task.check_model(model, BYTES)


def test_a_variant_that_drops_keys_between_calls_is_refused(path: str) -> None:
    model, task = tiny_llama(), PerplexityTask(data=path, max_length=16)
    with patchattn.patched(model, "streaming_llm", recent=8):
        task.check_model(model, BYTES)
    with (
        patchattn.patched(model, "knorm", budget=8),
        pytest.raises(ValueError, match="Under 'knorm' a window in one forward is that of the unpatched model"),
    ):
        task.check_model(model, BYTES)


def test_a_model_that_is_lost(path: str) -> None:
    sums = {"max_length": 16, "position_nll": [1e5], "position_tokens": [10]}
    scores = PerplexityTask(data=path).score([{"nll": 1e5, "tokens": 10, "bytes": 9, **sums}])
    assert scores["perplexity"] == math.inf
    assert scores["nats_per_token"] == scores["nats_per_token@1-15"] == 1e4


def test_a_picture_of_positions(tmp_path: Path) -> None:
    losses = {
        "unpatched": [PositionLoss(1, 3, 2.0, 10), PositionLoss(4, 7, 1.5, 10)],
        "logn": [PositionLoss(1, 3, 2.1, 10), PositionLoss(4, 7, 1.25, 10)],
    }
    figure = plot_positions(losses, title="By position")
    (axes,) = figure.axes
    assert axes.get_title() == "By position"
    assert "tokens" in axes.get_xlabel()
    assert "nats per token" in axes.get_ylabel()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["unpatched", "logn"]
    assert [list(line.get_xdata()) for line in axes.get_lines()] == [[2.0, 5.5]] * 2
    assert [list(line.get_ydata()) for line in axes.get_lines()] == [[2.0, 1.5], [2.1, 1.25]]
    figure.savefig(tmp_path / "positions.png")
    assert (tmp_path / "positions.png").read_bytes().startswith(b"\x89PNG")
    for wrong in ({}, {"a": []}, dict.fromkeys("abcdefg", losses["logn"])):
        with pytest.raises(ValueError, match=r"nothing to draw|told apart"):
            plot_positions(wrong)
    with pytest.raises(ValueError, match="no rows"):
        position_losses([])
