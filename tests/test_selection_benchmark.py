"""benchmarks/selection.py: its rows on short texts, with the densities that the settings ask for, and its page."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from .long_context import BYTES, tiny_llama

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script() -> Any:
    specification = importlib.util.spec_from_file_location("selection_table", ROOT / "benchmarks" / "selection.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def rows_of(path: Path) -> dict[str, Any]:
    return {(row := json.loads(line)).pop("key"): row for line in path.read_text(encoding="utf-8").splitlines()}


def test_decoding(script: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for _ in range(2):  # the second time nothing is left to measure
        script.decode(keys=[160], share=[0.25], page=[16, 8], repeats=1, rows=path)
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2
    rows = rows_of(path)
    assert {key: row["density"] for key, row in rows.items()} == {
        "decode/160/quest, pages of 16, 25%": pytest.approx(48 / 160),  # 40 keys are three pages of 16
        "decode/160/quest, pages of 8, 25%": pytest.approx(40 / 160),
    }
    assert all([*row["ms"]] == ["sdpa", "grouped rows", "quest"] for row in rows.values())


def test_prompts(script: Any, tmp_path: Path) -> None:
    script.prefill(tokens=[400], repeats=1, flex=False, rows=tmp_path / "rows.jsonl")
    rows = rows_of(tmp_path / "rows.jsonl")
    shares = [(min(i, 256) + min(max(i - 256, 0), 64)) / i for i in range(1, 401)]
    assert rows["prefill/400/streaming"]["density"] == pytest.approx(sum(shares) / 400, abs=1e-3)
    assert rows["prefill/400/triangle"]["density"] == 1.0  # up to 520 tokens it is dense


def test_lists_are_shared_and_have_their_share(script: Any, tmp_path: Path) -> None:
    script.lists(tokens=[1024], share=0.25, repeats=1, rows=tmp_path / "rows.jsonl")
    row = rows_of(tmp_path / "rows.jsonl")["lists/1024/shared lists, 25%"]
    assert row["density"] == pytest.approx(0.25, abs=0.05)
    chosen = script.shared_lists(1024, 0.25)
    assert chosen.indices.shape[:3] == (1, 1, 16)
    for block in range(16):
        own = chosen.indices[0, 0, block, : chosen.counts[0, 0, block]].tolist()
        assert own == sorted(set(own))
        assert own[-1] == block


def test_whole_steps_and_the_page(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    folder, rows, page = tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "page.md"
    tiny_llama(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2).save_pretrained(folder)
    BYTES.save_pretrained(folder)
    script.model(folder, context=[600], share=0.1, page=8, rounds=2, tokens=1, threads=1, rows=rows)
    row = rows_of(rows)["model/600/quest, pages of 8, 10%"]
    assert {name: len(times) for name, times in row["ms"].items()} == {"plain": 2, "buffered": 2, "quest": 2}
    script.page(rows=rows, markdown=page)
    text = page.read_text(encoding="utf-8")
    assert "| model, 16384, quest, pages of 64, 10%: plain over quest | at least 2.2 | not measured yet |" in text
    assert "| model | quest, pages of 8, 10% | 600 |" in text
