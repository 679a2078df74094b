"""benchmarks/cache_answers.py: its statistics by formulas, its prompts, and a run that goes on where it was stopped."""

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import patchattn

from .long_context import BYTES, tiny_llama

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    specification = importlib.util.spec_from_file_location("cache_answers", ROOT / "benchmarks" / "cache_answers.py")
    assert specification is not None
    assert specification.loader is not None
    found = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(__import__("sys").modules, "cache_answers", found)
    specification.loader.exec_module(found)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    return found


@pytest.fixture
def how(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "model"
    tiny_llama(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2).save_pretrained(path)
    BYTES.save_pretrained(path)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    return {"model": path, "folder": tmp_path / "answers", "text": str(text), "longbench": None, "length": 600}


def test_differences_are_of_pairs(script: ModuleType) -> None:
    dense = {0: 100.0, 1: 100.0, 2: 0.0, 3: 100.0, 5: 0.0}
    found = {0: 0.0, 1: 100.0, 2: 100.0, 3: 0.0, 4: 100.0}  # number 4 has no pair
    count, mean, difference, error = script.compared(found, dense)
    pairs = 100 * np.array([-1.0, 0.0, 1.0, -1.0])
    assert (count, mean, difference) == (4, 50.0, pairs.mean())
    assert error == pytest.approx(stats.sem(pairs))
    assert math.isnan(script.compared({}, dense)[1])


@pytest.mark.parametrize("name", ["single", "multi-key", "tracking"])
def test_a_prompt_is_cut_before_its_question(script: ModuleType, name: str) -> None:
    case = script.needle(BYTES, name, 1, 700, None)
    task = script.NEEDLES[name](samples=2, lengths=[700], max_new_tokens=8)
    assert case.text + case.question == task.prompt(BYTES, 1).tokens
    question = task.sample(1).frame.question
    assert question in BYTES.decode(case.question)
    assert question not in BYTES.decode(case.text)
    assert case.score(" ".join(task.sample(1).expected)) == 100.0
    assert case.score("nothing") == 0.0


def test_a_run_goes_on_where_it_was_stopped(script: ModuleType, how: dict[str, Any], tmp_path: Path) -> None:
    asked = {"samples": 1, "method": ["knorm", "h2o"], "share": [0.5], "dtype": "float32", "threads": 1}
    script.run(**how, **asked, minutes=-1.0)
    path = how["folder"] / script.ROWS
    assert not path.exists()
    script.run(**how, **asked, minutes=1e9)
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 3 * (3 * 2 + 1)  # three needles at two moments, a loss
    path.write_text("".join(lines[:-2]) + lines[-2][:20])
    script.run(**how, **asked, minutes=1e9)
    again = path.read_text().splitlines(keepends=True)
    assert again == lines
    losses = {key: value for key, value in script.values_of(how["folder"]).items() if key.startswith("loss/")}
    assert 0 < losses["loss/0/before the question/dense/1"] < 10
    rows = [json.loads(line) for line in lines]
    right = "single/0/with the question/dense/1"
    path.write_text("".join(json.dumps({**row, "value": 100.0} if row["key"] == right else row) + "\n" for row in rows))
    script.page(how["model"], how["folder"], output=tmp_path / "page.md", dtype="float32", threads=1)
    table = [line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    dense = next(row for row in cells if row[0] == "dense")
    knorm = next(row for row in cells if row[0] == "knorm")
    assert dense == ["dense", "1", "100.0", "0.0", "0.0", "33.3", "", "", "3"]
    assert knorm == ["knorm", "0.5", "0.0", "0.0", "0.0", "0.0", "-33.3", f"{stats.sem([-100, 0, 0]):.1f}", "3"]


def test_dense_answers_are_those_of_generate(script: ModuleType) -> None:
    model = tiny_llama(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2).eval()
    case = script.needle(BYTES, "single", 0, 600, None)
    ids = torch.tensor([case.text + case.question])
    with torch.inference_mode():
        expected = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 600:]
        for patches in ((), ("knorm",)):  # which keeps everything
            for name in patches:
                patchattn.patch_model(model, name, budget=1 << 30)
            cache = script.DynamicCache(config=model.config)
            logits = script.read(model, cache, case.text + case.question)
            assert script.answer(model, BYTES, cache, logits, 5, False) == BYTES.decode(expected)
