"""benchmarks/caches.py: its statistics by formulas, its settings, and a run that goes on where it was stopped."""

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM

import patchattn

from .long_context import BYTES, tiny_llama

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    specification = importlib.util.spec_from_file_location("caches", ROOT / "benchmarks" / "caches.py")
    assert specification is not None
    assert specification.loader is not None
    found = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(found)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    tiny_llama(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2).save_pretrained(path)
    BYTES.save_pretrained(path)
    return path


def test_differences_are_of_pairs(script: ModuleType) -> None:
    dense = {0: 1.0, 1: 1.0, 2: 0.0, 3: 1.0, 5: 0.0}
    found = {0: 0.0, 1: 1.0, 2: 1.0, 3: 0.0, 4: 1.0}  # number 4 has no pair
    count, accuracy, difference, error = script.compared(found, dense)
    pairs = 100 * np.array([-1.0, 0.0, 1.0, -1.0])
    assert (count, accuracy, difference) == (4, 50.0, pairs.mean())
    assert error == pytest.approx(stats.sem(pairs))
    assert math.isnan(script.compared({}, dense)[1])


def test_every_method_keeps_its_share(script: ModuleType, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    gates = script.random_gates(model)
    for method in ("streaming_llm", *script.SCORED, "duo"):
        variant, settings = script.settings_of(method, 0.5, 400, gates)
        patchattn.patch_model(model, variant, settings)
        with torch.inference_mode():
            cache, _ = script.filled(model, 400)
            script.steps(model, cache, 2)()
        patchattn.unpatch_model(model)
        tolerance = {"adakv": 0.03, "duo": 0.2, "pyramidkv": 0.05}.get(method, 0.02)  # rounding; whole heads
        assert script.held_tokens(cache) == pytest.approx(0.5, abs=tolerance), method


def test_answers_are_kept_and_the_page_says_what_there_is(script: ModuleType, folder: Path, tmp_path: Path) -> None:
    answers, page = tmp_path / "answers", tmp_path / "caches.md"
    how = {"length": [600, 700], "share": [0.5], "samples": 2, "dtype": "float32", "threads": 1, "data": None}
    how |= {"gates": None, "output": page, "folder": answers, "method": ["knorm", "duo (random gates)"]}
    script.quality(folder, **how, minutes=-1.0)
    assert not answers.exists()
    script.quality(folder, **how, minutes=1e9)
    files = sorted(answers.glob("*/*/*/process_0.jsonl"))
    assert len(files) == 6
    for path in (files[0], files[-1]):  # of the dense model and of knorm: one answer each is put right
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[0]["pred"] = " ".join(rows[0]["expected"])
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = [path.read_bytes() for path in files]
    script.quality(folder, **how, minutes=1e9)
    assert [path.read_bytes() for path in files] == before
    table = [line.split("|")[1:-1] for line in page.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in table]
    dense, knorm, duo = cells[2:]
    assert [row[0] for row in cells[2:]] == ["dense", "knorm", "duo (random gates)"]
    assert dense[-1] == duo[-1] == knorm[-1] == "4"
    assert (dense[4], knorm[4], duo[4]) == ("25.0", "25.0", "0.0")
    assert knorm[5:7] == ["+0.0", f"{stats.sem([-100, 0, 100, 0]):.1f}"]
    assert duo[5:7] == ["-25.0", "25.0"]
    assert not patchattn.patch_info(tiny_llama()).patches


def test_costs_are_written_down(script: ModuleType, folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "cost.md"
    how = {"context": [300], "share": 0.25, "method": ["buffered", "knorm"], "rounds": 2, "tokens": 1}
    script.cost(folder, **how, dtype="float32", threads=1, output=page)
    rows = [line for line in page.read_text().splitlines() if line.startswith("| 300 ")]
    assert [row.split("|")[2].strip() for row in rows] == ["buffered", "knorm"]
    assert float(rows[0].split("|")[3]) == 1.0
    assert float(rows[1].split("|")[3]) == pytest.approx(0.25, abs=0.02)
