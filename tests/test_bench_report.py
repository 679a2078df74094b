"""Goals of the benchmark by hand, and its report, pictures and command."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from patchattn.bench import cases, plots
from patchattn.bench.cases import Case
from patchattn.bench.goals import judged
from patchattn.bench.report import to_markdown
from patchattn.bench.result import Result
from patchattn.bench.results import Report
from patchattn.cli.main import main

from .test_bench import CEILINGS


def hand_made(case: Case, times: dict[str, float | None], memory: dict[str, int] | None = None) -> list[Result]:
    """Results with these seconds; `None` is an implementation that is unavailable."""
    return [
        Result(case, name, "unavailable", "no such kernel")
        if seconds is None
        else Result(case, name, "measured", seconds=seconds, low=seconds, high=seconds, repeats=5, useful_flops=1e12,
                    floor=1e-4, peak_memory=(memory or {}).get(name), error=1e-3, torch_error=1e-3)
        for name, seconds in times.items()
    ]  # fmt: skip


def test_goals_by_hand() -> None:
    dense = {"SDPA flash": 2e-3, "SDPA cuDNN": 1.4e-3, "SDPA efficient": None}
    results = [
        *hand_made(cases.ROUTED, {"patchattn": 1e-3, **dense}),
        *hand_made(cases.ACT, {"patchattn": 5e-3, "SDPA flash": 2e-3, "eager N x N": 50e-3},
                   {"patchattn": 10, "eager N x N": 190}),
        *hand_made(cases.BLOCK_SPARSE, {"patchattn": 1e-3, "SDPA flash": None, "SDPA cuDNN": None,
                                        "SDPA efficient": None}),
    ]  # fmt: skip
    verdicts = judged(results)
    flash, best, training, *_ = verdicts
    assert (flash.measured, flash.met) == (pytest.approx(2.0), True)
    assert (best.measured, best.met) == (pytest.approx(1.4), True)
    assert (training.measured, training.met, training.reason) == (None, None, "not measured")
    act, faster, memory = verdicts[5:8]
    assert (act.measured, act.met) == (pytest.approx(2.5), False)
    assert (faster.measured, faster.met) == (pytest.approx(10.0), True)
    assert (memory.measured, memory.met) == (pytest.approx(10 / 190), False)
    assert verdicts[8].measured is None
    assert "SDPA flash is unavailable: no such kernel" in verdicts[8].reason


@pytest.mark.parametrize("status", ["wrong", "failed", "out of memory", "not run"])
def test_no_goal_is_met_on_half_a_comparison(status: Any) -> None:
    """A backend that was not timed might have been the best."""
    results = hand_made(cases.ROUTED, {"patchattn": 1e-3, "SDPA flash": 5e-3, "SDPA efficient": 9e-3})
    results.append(Result(cases.ROUTED, "SDPA cuDNN", status, "why"))
    flash, best, *_ = judged(results)
    assert flash.met
    assert (best.met, best.reason) == (None, f"SDPA cuDNN: {status}")
    wrong = [dataclasses.replace(results[0], status=status), *results[1:]]
    assert judged(wrong)[0].met is None


def test_goals_are_of_bfloat16() -> None:
    small = dataclasses.replace(cases.ROUTED, dtype="float32")
    assert all(v.measured is None for v in judged(hand_made(small, {"patchattn": 1e-3, "SDPA flash": 5e-3})))


# Files


def test_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    results = hand_made(cases.ROUTED, {"patchattn": 1e-3, "SDPA flash": 2e-3, "SDPA cuDNN": None})
    report = Report({"device": "a GPU", "date": "today", "command": "patchattn bench", "torch": "2"}, CEILINGS, results)
    report.write(path := tmp_path / "bench.json")
    again = Report.read(path)
    assert (again.machine, again.ceilings, again.results) == (report.machine, report.ceilings, report.results)
    text = to_markdown(again)
    assert "| routed llama3_8b prefill 8192 50% | patchattn | 1 (1 to 1) | 2.00 | 1000 | 10.0% | not measured |" in text
    assert "| routed llama3_8b prefill 8192 50% | SDPA cuDNN | unavailable |" in text
    assert "times faster than flash SDPA | at least 1.8 | 2 | met |" in text
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "schema": 99}))
    with pytest.raises(ValueError, match="schema 99; this version reads schema 2"):
        Report.read(path)


def test_pictures() -> None:
    times: dict[str, float | None] = {"patchattn": 1e-3, "SDPA flash": 2e-3, "SDPA cuDNN": None}
    lengths = [dataclasses.replace(cases.ROUTED, tokens=tokens) for tokens in (1024, 2048)]
    several = [result for case in lengths for result in hand_made(case, times)]
    single = hand_made(cases.ROUTED_DECODING, times)
    figure = plots.plot_operation([*several, *single], "routed")
    assert figure is not None
    lines, bars = figure.axes
    assert [line.get_label() for line in lines.get_lines()] == ["patchattn", "SDPA flash"]
    assert [label.get_text() for label in bars.get_yticklabels()] == ["SDPA flash", "patchattn"]
    assert plots.plot_operation(single, "act") is None


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, which = tmp_path / "out", ["--suite", "smoke", "--op", "temperature"]
    with pytest.raises(SystemExit) as done:
        main(["bench", *which, "--device", "cpu", "--seconds", "0", "--output", str(folder)])
    assert done.value.code == 0
    said = capsys.readouterr().out
    assert "1/1 temperature tiny prefill 64 x2 float32" in said
    assert "torch.compile: unavailable (compared on GPUs only)" in said
    assert {path.name for path in folder.iterdir()} == {"bench.json", "bench.md", "temperature.png"}
    assert all(verdict["measured"] is None for verdict in json.loads((folder / "bench.json").read_text())["goals"])
    with pytest.raises(SystemExit):
        main(["bench", "--suite", "goals", "--device", "cpu", "--output", str(folder)])
    assert "needs a GPU" in capsys.readouterr().err
