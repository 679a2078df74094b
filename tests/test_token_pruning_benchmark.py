"""benchmarks/token_pruning.py: tokens as layers get them, and a verdict of the two ratios."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script() -> ModuleType:
    path = ROOT / "benchmarks" / "token_pruning.py"
    specification = importlib.util.spec_from_file_location("token_pruning", path)
    assert specification is not None
    assert specification.loader is not None
    found = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(found)
    return found


def test_tokens_and_operations(script: ModuleType, tmp_path: Path) -> None:
    script.main(output=tmp_path / "page.md", width=64, layers=3, counts=True)
    lines = [line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("| ")]
    assert lines[1].split(" | ")[1:4] == [
        "1632 of 1920",
        "0.850",
        "0.851",
    ]  # the row that ranks besides, 2 x 640 + 64 + 288 of 3 x 640
    assert lines[2].split(" | ")[1:4] == ["768 of 1920", "0.400", "0.400"]  # 3 x (64 + 192)
    assert all(line.endswith("| 1.00 | yes |") for line in lines[1:])


def test_a_time_out_of_proportion_is_told(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.time, "perf_counter", lambda: 0.0)
    original = script.Watched.run

    def slow(self):
        found = original(self)
        found.seconds = 1.0  # whatever the number of tokens
        return found

    monkeypatch.setattr(script.Watched, "run", slow)
    line = script.row(script.model_of(64, 3), next(iter(script.CASES)), 1, counts=False)
    assert line.endswith("| 0.850 | 1.000 | 1.18 | no |")
