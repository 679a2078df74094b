"""benchmarks/selection.py: both of its tables on short texts, with the densities that the settings ask for."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script() -> Any:
    specification = importlib.util.spec_from_file_location("selection_table", ROOT / "benchmarks" / "selection.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def cells(path: Path) -> list[list[str]]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_decoding(script: Any, tmp_path: Path) -> None:
    script.decode(keys=[160], share=[0.25], page=[16, 8], repeats=1, markdown=tmp_path / "table.md")
    rows = cells(tmp_path / "table.md")
    assert [row[:3] for row in rows] == [
        ["quest, pages of 16, 25%", "160", f"{48 / 160:.3f}"],  # 40 keys are three pages of 16
        ["quest, pages of 8, 25%", "160", f"{40 / 160:.3f}"],
    ]
    for row in rows:
        assert "of sdpa" in row[-1]
        assert "of grouped rows" in row[-1]


def test_prompts(script: Any, tmp_path: Path) -> None:
    script.prefill(tokens=[400], repeats=1, markdown=tmp_path / "table.md")
    rows = cells(tmp_path / "table.md")
    assert [row[:2] for row in rows] == [["streaming", "400"], ["triangle", "400"]]
    shares = [(min(i, 256) + min(max(i - 256, 0), 64)) / i for i in range(1, 401)]
    assert float(rows[0][2]) == pytest.approx(sum(shares) / 400, abs=1e-3)
    assert float(rows[1][2]) == 1.0  # up to 520 tokens it is dense
