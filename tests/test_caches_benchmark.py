"""benchmarks/caches.py: its settings, and what it writes down."""

import importlib.util
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


def test_costs_are_written_down(script: ModuleType, folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "cost.md"
    how = {"context": [300], "share": 0.25, "method": ["buffered", "knorm"], "rounds": 2, "tokens": 1}
    script.cost(folder, **how, dtype="float32", threads=1, output=page)
    rows = [line for line in page.read_text().splitlines() if line.startswith("| 300 ")]
    assert [row.split("|")[2].strip() for row in rows] == ["buffered", "knorm"]
    assert float(rows[0].split("|")[3]) == 1.0
    assert float(rows[1].split("|")[3]) == pytest.approx(0.25, abs=0.02)
