"""Attention Sorting against the attentions that eager attention returns."""

import json
from pathlib import Path

import pytest
import torch

import patchattn
from patchattn.cli import main as cli
from patchattn.inspection.attention_sorting import attention_sorting, sorted_by

from .families import FAMILIES
from .long_context import BYTES, tiny_llama

DOCUMENTS, QUESTION, BEFORE = ["Cats sleep.", "The sky is blue.", "Two and two.", "Go!"], " Why?", "Read: "


def by_eager(order: list[int]) -> tuple[list[int], list[float]]:
    """The ids of a prompt, and of each document the mean attention of the last token to its tokens."""
    texts = [BEFORE, *(DOCUMENTS[number] for number in order), QUESTION]
    ids, starts = [1], []
    for text in texts:
        starts.append(len(ids))
        ids += list(BYTES(text, add_special_tokens=False)["input_ids"])
    model = tiny_llama(num_hidden_layers=2)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(torch.tensor([ids]), output_attentions=True).attentions
    last = torch.stack(attentions)[:, 0, :, -1].double().mean((0, 1))
    scores = [0.0] * len(order)
    for place, number in enumerate(order, start=1):
        scores[number] = float(last[starts[place] : starts[place + 1]].mean())
    return ids, scores


def test_the_highest_comes_last_and_of_equal_ones_the_order_stays() -> None:
    assert sorted_by((0, 1, 2), (0.2, 0.5, 0.3)) == (0, 2, 1)
    assert sorted_by((0, 2, 1), (0.2, 0.5, 0.3)) == (0, 2, 1)
    assert sorted_by((2, 0, 1), (0.5, 0.1, 0.5)) == (1, 2, 0)


def test_rounds() -> None:
    model, order = tiny_llama(num_hidden_layers=2), [0, 1, 2, 3]
    for rounds in (1, 2, 3):
        _, scores = by_eager(order)
        order = sorted(order, key=lambda number: scores[number])
        found = attention_sorting(model, BYTES, DOCUMENTS, QUESTION, before=BEFORE, rounds=rounds)
        assert list(found.order) == order
        assert found.scores == pytest.approx(scores, rel=1e-4)
        assert found.prompt.input_ids == by_eager(order)[0]
        assert found.rounds <= rounds
    assert order != [0, 1, 2, 3]


def test_an_order_that_stays_ends_it() -> None:
    found = attention_sorting(tiny_llama(), BYTES, ["one"], QUESTION, rounds=5)
    assert found.rounds == 1
    assert found.order == (0,)


def test_the_model_as_it_is_patched() -> None:
    model = tiny_llama(num_hidden_layers=2)
    plain = attention_sorting(model, BYTES, DOCUMENTS, QUESTION)
    patchattn.patch_model(model, "streaming", sinks=0, recent=8)  # the last document has a token among these
    found = attention_sorting(model, BYTES, DOCUMENTS, QUESTION)
    assert [number for number, score in enumerate(found.scores) if score > 0] == [3]
    assert all(score > 0 for score in plain.scores)


def test_what_is_refused() -> None:
    model = tiny_llama()
    for documents, question, rounds, error, says in (
        ([], QUESTION, 1, ValueError, "0 documents"),
        (["a"], "", 1, ValueError, "and a question"),
        (["a"], QUESTION, 0, ValueError, "rounds must be"),
        ("ab", QUESTION, 1, TypeError, "a list of texts"),
        (["a", ""], QUESTION, 1, ValueError, "is of no token"),
    ):
        with pytest.raises(error, match=says):
            attention_sorting(model, BYTES, documents, question, rounds=rounds)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="no causal self-attention"):
        attention_sorting(FAMILIES["bert"].make(), BYTES, ["a"], QUESTION)
    patchattn.patch_model(model, "sink")
    for implementation, says in (
        ("sdpa", "without the base implementation"),
        ("eager", "keys in a prompt of 7 tokens"),
    ):
        model.set_attn_implementation(implementation)
        with pytest.raises(NotImplementedError, match=says):
            attention_sorting(model, BYTES, ["a"], QUESTION)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama(num_hidden_layers=2)
    for part in (model, BYTES):
        part.save_pretrained(tmp_path / "model")
    files = [tmp_path / f"{number}.txt" for number in range(len(DOCUMENTS))]
    for file, text in zip(files, DOCUMENTS, strict=True):
        file.write_text(text)
    out = tmp_path / "order.json"
    command = [
        "sort-context",
        str(tmp_path / "model"),
        QUESTION,
        *map(str, files),
        "--separator",
        "",
        "--before",
        BEFORE,
    ]
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--rounds", "2", "--answer", "3", "--output", str(out), "--device", "cpu"])
    assert ended.value.code in (0, None)
    found = attention_sorting(model, BYTES, DOCUMENTS, QUESTION, before=BEFORE, rounds=2)
    written = json.loads(out.read_text())
    assert written["order"] == [str(files[number]) for number in found.order]
    assert written["scores"] == pytest.approx([found.scores[number] for number in found.order])
    assert isinstance(written["answer"], str)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in shown[: len(files)]] == written["order"]
