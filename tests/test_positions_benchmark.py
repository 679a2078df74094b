"""benchmarks/positions.py: what is scored by formulas, prompts that hold their answers, and a run that goes on."""

import importlib
import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patchattn

from .long_context import BYTES, tiny_llama

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
positions: Any = importlib.import_module("positions")
sys.path.pop(0)
common, demonstrations, documents, first_token, length, prompts, small = (
    sys.modules[f"positions_parts.{name}"]
    for name in ("common", "demonstrations", "documents", "first_token", "length", "prompts", "small")
)
TEXT = np.random.default_rng(0).integers(32, 127, 4000)


def nats(model: Any, tokens: list[int]) -> np.ndarray:
    """Of each token but the first, by a softmax written out."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].double().numpy()
    return np.array([math.log(np.exp(row).sum()) - row[token] for row, token in zip(logits, tokens[1:], strict=False)])


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    text = tmp_path / "text.txt"
    text.write_bytes(TEXT.astype(np.uint8).tobytes())
    for name, value in {"LENGTHS": (96, 160), "SCORED": 16, "BINS": (0, 32, 160), "TRAINED": 96}.items():
        monkeypatch.setattr(length, name, value)
    monkeypatch.setattr(small, "STAGES", ((2, 2, 48),))
    return common.Setup(None, None, text, text, None, tmp_path / "rows", tmp_path / "models", 2, (0,))


def test_a_row_of_the_small_model() -> None:
    tokens, is_answer = small.recall_row(TEXT, 128, np.random.default_rng(1), start=10, clean=20)
    said = {}
    for token in tokens[tokens >= small.SAID] - small.SAID:
        said[small.CHARACTERS + token // small.KEYS] = small.VALUES + token % small.KEYS
    assert len(said) == is_answer.sum() == small.FACTS
    assert [said[key] for key in tokens[:-1][is_answer[1:]]] == tokens[is_answer].tolist()
    assert tokens[tokens < small.CHARACTERS].tolist() == TEXT[10 : 10 + 128 - 3 * small.FACTS].tolist()
    assert (tokens[-2 * small.FACTS - 20 : -2 * small.FACTS] < small.CHARACTERS).all()


def test_length_by_formulas(setup: Any) -> None:
    jobs = dict(length.jobs(setup))
    assert list(jobs)[:2] == ["small-0/96/0", "small-0/160/0"]
    rows = {key: jobs[key]() for key in ("small-0/96/1", "small-0/160/1")}
    model, twin, text = length._loaded(setup, "small-0")
    lasts = []
    for count in (96, 160):
        tokens, is_last, is_answer = length._samples("small-0", text, count, 1)
        lasts.append(tokens[is_last].tolist())
        found = rows[f"small-0/{count}/1"]["found"]
        assert set(found) == set(length.settings("small-0"))
        for name, own in (("plain", model), ("ssmax", twin)):
            each = nats(own, tokens.tolist())
            np.testing.assert_allclose(found[name][0], each[is_last[1:]].mean(), atol=1e-4)
            np.testing.assert_allclose(found[name][2], each[is_answer[1:]].mean(), atol=1e-4)
        if count == 160:
            each, is_text = nats(model, tokens.tolist()), tokens[1:] < small.CHARACTERS
            bins = [each[start : end - 1][is_text[start : end - 1]].mean() for start, end in pairwise(length.BINS)]
            np.testing.assert_allclose(found["plain"][3], bins, atol=1e-4)
    assert lasts[0] == lasts[1]
    again = common.Setup(*(getattr(setup, name) for name in list(vars(setup))[:9]))
    assert torch.equal(length._loaded(again, "small-0")[0].lm_head.weight, model.lm_head.weight)
    assert not any(site["variants"] for site in patchattn.patch_info(model).sites)


def test_another_rotary_embedding_of_the_same_weights() -> None:
    model = small.built(0).eval()
    other = common.rotating(model, rope_type="linear", factor=4.0)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        found = other(ids, position_ids=4 * torch.arange(40)[None]).logits
        torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert other.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()


def test_prompts_hold_their_answers(tmp_path: Path) -> None:
    for prompt, hops in ((prompts.one_hop(10, 3), 1), (prompts.two_hops(12, 3), 2)):
        texts = [*prompt.sources, *prompt.documents]
        assert sum(prompt.answer in text for text in texts) == 1
        assert len(texts) == (10 if hops == 1 else 12)
    town = next(text for text in prompt.sources if prompt.answer in text).split(" is ")[0]
    assert [town in text for text in prompt.documents].count(True) == 1
    row = "Answer.\n\nThe following are given passages.\nPassage 1:\nA\nOn Paris.\n\nPassage 2:\nB\n"
    row += "Nothing.\n\nAnswer the question based on the given passages.\n\nQuestion: Where?\nAnswer:"
    file = tmp_path / "hotpotqa.json"
    for gold, count in (("Paris", 1), ("yes", 0)):
        file.write_text(f'{{"0": {{"origin_prompt": {row!r}, "gold": ["{gold}"]}}}}'.replace("'", '"'))
        found = prompts.natural(file, BYTES)
        assert len(found) == count
    assert prompts.natural(file, BYTES) == []


def test_documents_by_formulas(setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(num_hidden_layers=2, max_position_embeddings=4096)
    monkeypatch.setattr(common.Setup, "smol", (model, BYTES))
    prompt = prompts.two_hops(4, 0)
    row = documents._row(setup, prompt)
    assert set(row["found"]) == set(documents.SETTINGS)
    ids = BYTES("".join(text for _, text in documents.segments(prompt)), add_special_tokens=False)["input_ids"]
    answer = BYTES(f" {prompt.answer}", add_special_tokens=False)["input_ids"]
    expected = nats(model, [*ids, *answer])[-len(answer) :].mean()
    assert row["found"]["plain"][1] == pytest.approx(expected, abs=1e-4)
    assert row["tokens"][0] == len(ids)
    values = [loss for _, loss in row["found"].values()]
    assert len(set(values)) == len(values) - (row["found"]["sorted"] == row["found"]["plain"])
    config = model.config
    width, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    each = config.hidden_size * (2 * width + 2 * kv + 3 * config.intermediate_size)
    by_loops = sum(each + 2 * width * (token + 1) for token in range(5, 9)) * config.num_hidden_layers
    assert documents.operations(config, 9, 5) == by_loops


def test_demonstrations_by_formulas(setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(num_hidden_layers=2, max_position_embeddings=4096)
    monkeypatch.setattr(common.Setup, "smol", (model, BYTES))
    monkeypatch.setattr(demonstrations, "COUNT", 10)
    assert demonstrations.jobs(setup) == []  # no model, no reviews
    folder = tmp_path / "SST-2"
    folder.mkdir()
    for name, count in (("train", 12), ("dev", 1)):
        lines = [f"{name} {number} is a film\t{number % 2}" for number in range(count)]
        (folder / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines, ""]))
    setup.glue = tmp_path
    row = demonstrations._row(setup, 0)
    shown, (text, label) = demonstrations._reviews(setup, 0)
    assert (len(shown), sum(each for _, each in shown), text, label) == (10, 5, "dev 0 is a film", 0)
    said = [f"Review: {each}\nSentiment: {('negative', 'positive')[of_it]}\n\n" for each, of_it in shown]
    prompt = demonstrations.BEFORE + "".join(said) + f"Review: {text}\nSentiment:"
    ids, answers = (BYTES(each, add_special_tokens=False)["input_ids"] for each in (prompt, " "))
    assert row["found"]["plain"][1] == pytest.approx(nats(model, [*ids, answers[0]])[-1], abs=1e-4)
    assert row["tokens"] == len(ids)
    assert len({loss for _, loss in row["found"].values()}) == len(demonstrations.SETTINGS)
    for number in range(3):
        setup.write("demonstrations", str(number), row)
    page = "\n".join(demonstrations.section(setup, None))
    assert "3 reviews of SST-2's validation set" in page
    assert "FocusICL, B = 8, is better than plain demonstrations, by right answers: **not shown**" in page


def test_time_to_the_first_token_and_texts_beyond(setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(num_hidden_layers=2, max_position_embeddings=4096)
    monkeypatch.setattr(common.Setup, "smol", (model, BYTES))
    monkeypatch.setattr(first_token, "_median", lambda run, repeats: run() or 7.4)
    assert first_token.section(setup) == []
    first_token.measure(setup, (2, 3), 1)
    assert list(setup.rows("first_token"))[:2] == ["2/plain", "2/parallel_context"]
    assert first_token.section(setup)[-2].startswith("| block_attention | 3 |")
    assert first_token.section(setup)[-2].endswith("| 7 | 7 |")
    far = sys.modules["positions_parts.far"]
    monkeypatch.setattr(far, "LENGTH", 400)
    monkeypatch.setitem(far.SETTINGS, "self_extend", {"self_extend": {"group": 2, "window": 64}})
    rows = [far._row(setup, 0, name)["found"] for name in far.SETTINGS]
    assert rows[0] != rows[1]
    assert all(math.isfinite(value) for row in rows for value in row)


def test_a_page_of_rows(setup: Any, tmp_path: Path) -> None:
    rows = {name: [float(number % 2), 2.0 - 0.5 * number] for number, name in enumerate(documents.SETTINGS)}
    for number in range(8):
        more = {name: [right, loss + 0.1 * number] for name, (right, loss) in rows.items()}
        setup.write("documents", f"two/{number}", {"found": more, "tokens": [100, 20]})
        for count in length.LENGTHS:
            found = {name: [3.0 - n, 0.5, 1.0, [1.0, 2.0]] for n, name in enumerate(length.settings("small-0"))}
            setup.write("length", f"small-0/{count}/{number}", {"found": found})
    assert common.signed([1.5], [1.0], 1) == "+0.5"
    assert common.signed([1.0, 3.0], [1.0, 1.0], 1) == "+1.0 ± 1.0"
    page = positions.page(setup, "About.", tmp_path)
    assert "Attention Sorting: answers are likelier than in plain order, by the loss: **shown** (-0.50 nats" in page
    assert "Parallel encoding loses answers, by the loss: **not shown, the opposite is**" in page
    assert "The small Llama, 160 tokens, logn: lower loss than plain: **shown**" in page
    assert (tmp_path / "positions_length.png").stat().st_size > 1000
    assert "SmolLM2 at 12,288 tokens\n\nNot measured yet." in page
