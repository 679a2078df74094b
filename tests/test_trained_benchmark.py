"""benchmarks/trained.py: tasks by loops, a run that goes on, and what may be said of its rows."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from .long_context import BYTES, tiny_llama

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
trained: Any = importlib.import_module("trained")
sys.path.pop(0)
adapted, common, conversion, landmarks, toys, tasks = (
    sys.modules[f"trained_parts.{name}"]
    for name in ("adapted", "common", "conversion", "landmarks", "toys", "toy_tasks")
)


LOOKED = {"first": 0.3, "kurtosis": 10.0}


def made(name: str, rows: int = 20) -> list[tuple[list[int], list[int]]]:
    """Rows of a task: tokens, and for each what is to follow it, -100 for nothing that counts."""
    task = tasks.TASKS[name]
    batch = task.make(rows, task.train, torch.Generator().manual_seed(1))
    pairs = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    return [(ids[:-1], labels[1:]) for ids, labels in pairs]


def test_counting() -> None:
    for ids, answers in made("counting"):
        count = 0
        for token, answer in zip(ids, answers, strict=True):
            count = {1: count + 1, 2: 0}.get(token, count)
            assert answer == (4 + min(count, tasks.COUNTS - 1) if token == 3 else -100)


def test_flip_flop() -> None:
    for ids, answers in made("flip-flop"):
        assert ids[0] == 1  # the first instruction writes
        bit = None
        for place in range(0, len(ids) - 1, 2):
            does, value = ids[place : place + 2]
            bit = value if does == 1 else bit
            assert does != 2 or value == bit
            assert answers[place] == (bit if does == 2 else -100)
            assert answers[place + 1] == -100


def test_memory() -> None:
    for ids, answers in made("memory"):
        known: dict[int, int] = {}
        for token, answer in zip(ids, answers, strict=True):
            if token < tasks.KEYS * tasks.VALUES:
                known[token // tasks.VALUES] = token % tasks.VALUES
                assert answer == -100
            else:
                value = known.get(token - tasks.KEYS * tasks.VALUES)
                assert answer == (-100 if value is None else tasks.KEYS * tasks.VALUES + tasks.KEYS + value)


def test_positions_are_all_asked_of_the_same_token() -> None:
    ((ids, answers),) = made("positions", 1)
    assert set(ids) == {0}
    assert answers == list(range(tasks.PLACES - 1))


def test_one_block_alone_holds_both_letters() -> None:
    for ids, answers in made("blocks", 60):
        *told, one, other, _ = ids
        blocks = [told[start : start + tasks.BLOCK] for start in range(0, len(told), tasks.BLOCK + 1)]
        assert len(blocks) == tasks.BLOCKS
        assert all(len(set(block)) == tasks.BLOCK for block in blocks)
        (found,) = (block for block in blocks if {one, other} <= set(block))
        assert one != other
        assert answers == [-100] * (len(ids) - 1) + [found[0]]


def test_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = tasks.TASKS["positions"]._replace(steps=2)
    monkeypatch.setitem(toys.TASKS, "positions", short)
    monkeypatch.setattr(toys, "arms", lambda task: toys.ARMS[task] if task == "positions" else {})
    for seeds in (2, 3):  # the second run begins at the third seed
        trained.run(tmp_path, seeds=seeds, part=["toys"], model=None, stories=None, text=None, training=None)
    rows = (tmp_path / "toys.jsonl").read_text().splitlines()
    assert len(rows) == 6
    assert '"positions/rope and urpe/2"' in rows[-1]
    page = trained.page_of(common.Setup(None, None, None, None, tmp_path), tmp_path)
    assert "URPE tells places that rotary embedding alone cannot" in page
    assert "CoPE counts better than rotary embedding | not measured | 0 seeds, 3 are needed" in page
    assert (tmp_path / "trained_toys.png").exists()


def test_rows_of_smollm2_are_told(tmp_path: Path) -> None:
    """Three seeds of LoRA alone and of two variants, of two texts; and every start of a conversion."""
    setup = common.Setup(None, None, None, None, tmp_path)
    looked = {**LOOKED, "needles": [[1.0, 0.1]], "start": [3.0, 3.5], "text": "valid.txt"}
    setup.write("adapted", "before training/20/0", {"losses": [3.0, 3.5], **looked})
    for seed in range(3):
        for name, less, first in (("LoRA alone", 0.0, 0.3), ("sink", 0.0, 0.29), ("gated", 0.1 + seed / 100, 0.3)):
            moved = {} if name == "LoRA alone" else {"logit": [5.0, 0.25, 0.5]}
            row = {**looked, "losses": [3.0 - less, 3.5 - less], "moved": moved, "train": [3.0], "first": first}
            setup.write("adapted", f"{name}/20/{seed}", row)
        setup.write("adapted", f"gated/10/{seed}", {**looked, "losses": [9.0, 9.0], "moved": {}, "train": [9.0]})
    for start, loss in zip(conversion.STARTS, (1.0, 4.0, 2.0, 2.5, 1.5), strict=True):
        each = {str(step): [loss, loss + 0.1, loss + 0.3] for step in conversion.STEPS}
        setup.write("conversion", f"SmolLM2/{start}/0", {"losses": each})
    page = trained.page_of(setup, tmp_path)
    error = 0.01 / 3**0.5
    assert stats.t.ppf(0.975, 2) * error < 0.11
    assert f"`gated` beside LoRA has a lower loss than LoRA alone | **shown** | -0.11 ± {error:.2g} nats" in page
    assert "`sink` beside LoRA has a lower loss than LoRA alone | not shown | +0 ± 0" in page
    assert "with `sink` the first token gets less attention | **shown** | -1 ± " in page
    assert "after 40 steps: `components` loses less than `mean` | **shown** | -2.5" in page
    assert "10 steps: `gated`" not in page  # nothing to compare it to
    assert "measured on valid.txt" in page
    assert "| sink | `logit` | 5 | 0.25 | 0.5 |" in page
    assert all((tmp_path / f"trained_{name}.png").exists() for name in ("lora", "conversion"))


def test_rows_of_landmarks_are_told(tmp_path: Path) -> None:
    """Three seeds beside LoRA alone: of what is lost, the 95 % interval must lie below what is allowed."""
    setup = common.Setup(None, None, None, None, tmp_path)

    def row(loss: float) -> dict[str, Any]:
        each = {name: (loss + more, loss / 2) for name, more in (("all", 0.0), ("4", 0.04), ("1", 0.3))}
        return {
            name: {"losses": [of, of + 0.1 + of / 1e4, of + 0.2], "needles": [nats] * 4}
            for name, (of, nats) in each.items()
        }

    setup.write("landmarks", "0/0", row(5.0))
    assert "Landmarks on SmolLM2\n\nNot measured yet." in trained.page_of(setup, None)
    for seed in range(3):
        setup.write("landmarks", f"20/{seed}", row(3.0 + seed / 100))
        alone = {**LOOKED, "losses": [2.5], "needles": [[1.0, 0.1]], "text": "valid.txt"}
        setup.write("adapted", f"LoRA alone/20/{seed}", alone)
    page = trained.page_of(setup, None)
    assert "beside LoRA alone | not shown | +0.61 ± " in page
    assert "reading 4 of up to 16 earlier sections costs less than 0.05 nats beside all | **shown** | +0.04 ± " in page
    assert "reading 1 of up to 16 earlier sections costs less than 0.05 nats beside all | not shown | +0.3 ± " in page
    assert "better than before training | **shown** | -0.995 ± 0 nats, 4 prompts" in page


def test_the_other_side_is_said() -> None:
    found = common.claim("x", [2.0, 2.1, 2.2], [1.0, 1.1, 1.2], "nats", wants=-1, of="seeds")
    assert found.shown == "not shown; the opposite is"
    assert common.claim("x", [1.0, 2.0], [0.0, 1.0], "nats", wants=1, of="seeds").shown == "not measured"


def test_unknown_parts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="There are the parts toys, conversion, adapted, landmarks, got x"):
        trained.run(tmp_path, None, part=["x"])


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tiny Llama in place of SmolLM2."""
    text = tmp_path / "text.txt"
    text.write_text("The river is wide. A bridge leads over it to the mill. " * 60)
    monkeypatch.setattr(common.Setup, "smol", lambda _: tiny_llama(num_hidden_layers=2, max_position_embeddings=4096))
    monkeypatch.setattr(common.Setup, "tokenizer", BYTES)
    return common.Setup(tmp_path, None, text, text, tmp_path / "rows", 1, 2, windows=3, needles=1)


@pytest.mark.parametrize("name", ["before training", "LoRA alone", "sink", "qk_norm"])
def test_a_row_beside_lora(small: Any, name: str) -> None:
    row = adapted._row(small, name, 0 if name == "before training" else 2, 0)
    assert row["start"] == pytest.approx(common.losses(small.smol(), small.texts[:2]), abs=2e-2)
    assert len(row["losses"]) == 3
    assert 0 < row["first"] < 1
    assert len(row["needles"]) == 1
    moved = row.get("moved", {})
    assert set(moved) == {"sink": {"logit"}}.get(name, set()) if name != "qk_norm" else len(moved) == 4
    for start, root, most in moved.values():
        assert 0 < root <= most or start == 1.0  # norms move at the second step, once exponents have


def test_a_row_of_a_conversion(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "STEPS", (0, 1, 2))
    monkeypatch.setattr(conversion, "CALIBRATION", 2)
    monkeypatch.setitem(conversion.KEPT, "SmolLM2", (2, 1))
    rows = {start: conversion._row(small, "SmolLM2", start, 0)["losses"] for start in ("not converted", "mean")}
    assert rows["not converted"]["0"] == common.losses(small.smol(), small.texts)
    assert all(list(row) == ["0", "1", "2"] for row in rows.values())
    assert len({tuple(losses) for row in rows.values() for losses in row.values()}) == 6


def test_a_row_of_landmarks(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing were trained, a text without earlier sections has the losses of the model itself."""
    monkeypatch.setattr(landmarks, "MARK", "~")  # none of the text has it
    monkeypatch.setattr(BYTES, "convert_tokens_to_ids", lambda mark: 62, raising=False)
    tokens = small.texts[0, : landmarks.EVERY]
    model = small.smol()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(landmarks, "EVERY", len(tokens) + 1)
        found = landmarks._losses(model, tokens.tolist(), 62)
    assert found.mean().item() == pytest.approx(common.losses(model, tokens[None])[0], abs=1e-4)
    row = landmarks._row(small, 2, 0)
    assert len(row["train"]) == 2
    assert [len(row[name]["losses"]) for name in landmarks.TOPS] == [3, 3, 3]
    assert row["all"]["losses"] != row["1"]["losses"]
