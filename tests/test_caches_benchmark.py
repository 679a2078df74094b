"""benchmarks/caches.py: its settings, the formula of bytes, and what it writes down."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
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


def test_every_method_keeps_its_share(script: ModuleType, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    gates = script.random_gates(model)
    for method in ("streaming_llm", *script.SCORED, "think", "duo"):
        share = 0.75 if method == "think" else 0.5
        variant, settings = script.settings_of(method, share, 400, gates)
        patchattn.patch_model(model, variant, settings)
        with torch.inference_mode():
            cache, _ = script.filled(model, 400)
            script.steps(model, cache, 2)()
        patchattn.unpatch_model(model)
        tolerance = {"adakv": 0.03, "duo": 0.2, "pyramidkv": 0.05, "think": 0.03}.get(method, 0.02)  # rounding
        assert script.held_tokens(cache) == pytest.approx(share, abs=tolerance), method


def test_every_row_is_measured_once_and_written_down(script: ModuleType, folder: Path, tmp_path: Path) -> None:
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    how = {"context": [600], "rows": rows, "dtype": "float32", "threads": 1}
    for _ in range(2):  # the second time nothing is left to measure
        script.memory(folder, **how, method=["buffered", "knorm", "duo half"])
        script.decode(folder, **how, method=["buffered", "knorm", "h2o"], rounds=2, tokens=1)
        script.prefill(folder, length=300, method=["knorm", "think"], rounds=1, rows=rows, dtype="float32", threads=1)
    keys = [json.loads(line)["key"] for line in rows.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 4 + 3 + 2
    script.page(rows=rows, output=page)
    text = page.read_text()
    assert "| bytes beside the formula, largest difference | at most 5 % |" in text
    assert "| duo half, 16k: decoding over plain | at least 1.7 | not measured yet |" in text
    assert "| knorm: deciding, of a prompt of 300 | at most 5 % |" in text
    assert "| 600 | buffered | " in text


def test_bytes_are_those_of_the_formula(script: ModuleType, folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    script.memory(folder, context=[2048], method=None, rows=rows, dtype="float32", threads=1)
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert {row["key"]: row["bytes"] / row["formula"] for row in found} == {
        row["key"]: pytest.approx(1.0, abs=0.05) for row in found
    }
    assert next(row for row in found if row["key"].endswith("/knorm"))["bytes"] < 0.5 * found[0]["dense"]


def test_time_is_counted_once(
    script: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By a clock that goes on by one at each look: a pair of looks for each call of a variant, in two layers."""
    looks = iter(range(10**6))
    monkeypatch.setattr(script.time, "perf_counter", lambda: float(next(looks)))
    rows = tmp_path / "rows.jsonl"
    script.prefill(folder, length=300, method=["knorm"], rounds=1, rows=rows, dtype="float32", threads=1)
    own, whole = json.loads(rows.read_text())["seconds"][0]
    assert own == 2 * 2 * 2  # rule and forget, in the prompt and in the first token, of two layers
    assert whole == 2 * own + 1
