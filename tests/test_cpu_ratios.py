"""benchmarks/cpu_ratios.py: what it divides by what, and that nothing wrong is timed."""

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def ratios(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, on a clock by which dense attention takes 3 s and ours 2, in later rounds twice as long."""
    path = ROOT / "benchmarks" / "cpu_ratios.py"
    specification = importlib.util.spec_from_file_location("cpu_ratios", path)
    assert specification is not None
    assert specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    spent = itertools.chain([100.0, 100.0, 3.0, 2.0], itertools.cycle([6.0, 4.0]))
    now = 0.0

    def clock() -> Any:
        nonlocal now
        for seconds in spent:
            yield now
            now += seconds
            yield now

    ticks = clock()
    monkeypatch.setattr(script.time, "perf_counter", lambda: next(ticks))
    return script


@pytest.mark.parametrize(
    ("op", "ratio"), [("act", "0.67"), ("block_sparse", "1.50"), ("long_windows", "1.50"), ("routed", "1.50")]
)
def test_ratios_of_the_shortest_times(op: str, ratio: str, ratios: ModuleType) -> None:
    row = ratios.measured(op, 48, 3)
    assert row[1:4] == ["48", "3000.0", "2000.0"]
    assert row[4] == f"**{ratio}**{' (declines)' if op == 'routed' else ''}"  # 48 tokens are too few to gather


def test_table(ratios: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    ratios.main(tokens=[40], op=["block_sparse"], rounds=1, threads=1, markdown=tmp_path / "table.md")
    assert torch.get_num_threads() == threads
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert "1 thread," in lines[2]
    assert lines[-1].startswith("| 64 sinks and 256 recent keys: times faster than dense | 40 |")
    assert len(lines[-1].split("|")) == len(lines[-2].split("|")) == len(lines[-3].split("|"))


def test_what_is_wrong_is_not_timed(ratios: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ratios.made("block_sparse", 48)
    wrong = lambda: {"output": made[1]()["output"] * 1.01}  # noqa: E731
    monkeypatch.setattr(ratios, "made", lambda *_: (made[0], wrong, *made[2:]))
    with pytest.raises(SystemExit, match="off by"):
        ratios.measured("block_sparse", 48, 1)
