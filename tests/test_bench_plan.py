"""What `patchattn bench` would run, in which order, against which rivals, and how a run is gone on with."""

import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from patchattn.bench import runner
from patchattn.bench.cases import Case, suite
from patchattn.bench.goals import GOALS
from patchattn.bench.installed import INSTALLED
from patchattn.bench.plan import plan
from patchattn.bench.problem import Implementation
from patchattn.bench.results import Report, conditions
from patchattn.bench.routed import RoutedProblem
from patchattn.bench.selected import SelectedProblem
from patchattn.bench.timing import Timing, in_turn
from patchattn.cli.main import main

from .test_bench import FORWARD, SMOKE, Counting, results_of

ROOT = Path(__file__).parents[1]
SMALL = ["bench", "--suite", "smoke", "--op", "temperature", "--op", "column_mass", "--device", "cpu", "--seconds", "0"]


def called(*arguments: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(list(arguments))
    return int(done.value.code or 0)


# In turn


def test_runs_take_turns() -> None:
    order: list[str] = []
    timings = in_turn([lambda: order.append("a"), lambda: order.append("b")], Counting(), seconds=0.01)
    assert "".join(order) == "aaaabbbb" + 5 * "aabb"
    assert timings == [Timing(1e-3, 1e-3, 1e-3, 10)] * 2


def test_what_fails_in_its_turn_leaves_the_others() -> None:
    calls: list[int] = []

    def fails() -> None:
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("an illegal memory access")

    failed, timed = in_turn([fails, lambda: None], Counting(), seconds=0.0)
    assert isinstance(failed, RuntimeError)
    assert isinstance(timed, Timing)
    assert timed.repeats == 5
    assert len(calls) == 6
    calls.clear()

    def make(problem: RoutedProblem) -> Callable[[], Any]:
        right = RoutedProblem.implementations[0].make(problem)

        def run() -> Any:
            fails()
            return right()

        return run

    first, second = results_of(FORWARD, Implementation("x", make, "gated"), RoutedProblem.implementations[0])
    assert (first.status, first.reason) == ("failed", "RuntimeError: an illegal memory access")
    assert second.status == "measured"


def test_all_are_verified_before_one_is_timed() -> None:
    watch, seen = Counting(), []

    def make(problem: RoutedProblem) -> Callable[[], Any]:
        seen.append(watch.runs)
        return RoutedProblem.implementations[0].make(problem)

    results = results_of(FORWARD, *(Implementation(name, make, "gated") for name in "abc"), watch=watch)
    assert [result.status for result in results] == ["measured"] * 3
    assert seen == [0, 0, 0]
    assert {result.dtype for result in results} == {"float32"}


# What is run


def goal_rows() -> list[list[str]]:
    text = (ROOT / "docs" / "performance.md").read_text()
    rows = re.findall(r"^\| (.*) \|$", text.split("## Goals")[1].split("###")[0], re.MULTILINE)
    return [row.split(" | ")[:2] for row in rows[1:]]


def test_quick_answers_every_row_of_the_documentation(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert [f"{goal.sense} {goal.bound:g}" for goal in GOALS] == [wanted for _, wanted in goal_rows()]
    assert called("bench", "--quick", "--dry-run", "--output", str(tmp_path / "none")) == 0
    said = capsys.readouterr().out
    for text, _ in goal_rows():
        assert f"answers: {text}\n" in said
    for goal in GOALS:
        (line,) = (line for line in said.splitlines() if f" {goal.case.name}: " in line)
        assert {*goal.of, *goal.over} <= set(line.split(": ")[1].split(", "))
    assert "Nothing begins after 480 s. Nothing was run." in said
    assert not list(tmp_path.iterdir())


def test_dry_run_lists_what_is_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = [*SMALL, "--output", str(tmp_path)]
    assert called(*arguments, "--dry-run") == 0
    listed = re.findall(r"^\d/2 (.*): (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert called(*arguments) == 0
    ran: dict[str, list[str]] = {}
    for row in Report.read(tmp_path / "bench.json").results:
        ran.setdefault(row.case.name, []).append(row.implementation)
    assert [(case, ", ".join(names)) for case, names in ran.items()] == listed


def test_quick_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert called("bench", "--quick", "--suite", "smoke", "--dry-run") != 0
    assert "Give one of the two" in capsys.readouterr().err
    with pytest.raises(ValueError, match="No goal compares temperature"):
        plan("quick", ["temperature"])
    assert [step.case for step in plan("goals")] == suite("goals")


# Resumed


def test_resume_runs_what_was_cut_off(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert called(*SMALL, "--output", str(tmp_path)) == 0
    report = Report.read(tmp_path / "bench.json")
    cut = report.results[-1]
    report.results[-1] = dataclasses.replace(cut, status="not run", seconds=None)
    kept = [row for row in report.results if row.case != cut.case]
    report.write(tmp_path / "bench.json")
    asked: list[Case] = []
    run_case = runner.run_case

    def spy(case: Case, *rest: Any, **how: Any) -> Any:
        asked.append(case)
        return run_case(case, *rest, **how)

    monkeypatch.setattr(runner, "run_case", spy)
    capsys.readouterr()
    assert called(*SMALL, "--output", str(tmp_path), "--resume", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "1 cases. 1 are finished and kept." in said
    assert called(*SMALL, "--output", str(tmp_path), "--resume") == 0
    assert asked == [cut.case]
    again = Report.read(tmp_path / "bench.json")
    assert [row for row in again.results if row.case != cut.case] == kept
    assert "not run" not in {row.status for row in again.results}
    assert len(again.results) == len(report.results)
    assert "resumed" in again.machine
    assert called(*SMALL, "--output", str(tmp_path), "--resume") == 0  # there is nothing left to do
    assert asked == [cut.case]


def test_resume_refuses_another_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert called(*SMALL, "--output", str(tmp_path)) == 0
    before = json.loads((tmp_path / "bench.json").read_text())
    (tmp_path / "bench.json").write_text(json.dumps({**before, "machine": {**before["machine"], "torch": "1.0"}}))
    assert called(*SMALL, "--output", str(tmp_path), "--resume") != 0
    assert "was measured with torch 1.0, and this is torch" in capsys.readouterr().err


# Rivals


def test_window_decoding_has_its_rival() -> None:
    (name,) = (name for name in SMOKE if name.startswith("block_sparse tiny decode"))
    found = {row.implementation: row for row in results_of(SMOKE[name], watch=Counting())}
    assert found["SDPA over the window"].status == "measured"
    prefill = {row.implementation: row for row in results_of(SMOKE["block_sparse tiny prefill 96 x2 float32"])}
    assert prefill["SDPA over the window"].status == "unavailable"


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    """Of `(T, H, D)`, in loops over heads; the last query's own key is the last."""
    outputs = []
    for head in range(query.shape[1]):
        group = head * key.shape[1] // query.shape[1]
        logits = scale * query[:, head].double() @ key[:, group].double().T
        if causal:
            own = torch.arange(len(query)) + len(key) - len(query)
            logits[torch.arange(len(key)) > own[:, None]] = -torch.inf
        outputs.append(logits.softmax(-1) @ value[:, group].double())
    return torch.stack(outputs, dim=1).to(query.dtype)


@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_installed_rivals_by_stand_ins(mode: Any, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    flash, infer = ModuleType("flash_attn_interface"), ModuleType("flashinfer")

    def flash_attn_func(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, causal: bool
    ) -> Any:
        found = [attention(*states, softmax_scale, causal) for states in zip(q, k, v, strict=True)]
        return torch.stack(found) * factor, "log-sum-exp"

    def prefill(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, sm_scale: float, kv_layout: str
    ) -> Any:
        assert kv_layout == "NHD"
        return attention(q, k, v, sm_scale, causal) * factor

    def decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, sm_scale: float, kv_layout: str) -> Any:
        assert kv_layout == "NHD"
        return attention(q[None], k, v, sm_scale, False)[0] * factor

    monkeypatch.setattr(flash, "flash_attn_func", flash_attn_func, raising=False)
    monkeypatch.setattr(infer, "single_prefill_with_kv_cache", prefill, raising=False)
    monkeypatch.setattr(infer, "single_decode_with_kv_cache", decode, raising=False)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", flash)
    monkeypatch.setitem(sys.modules, "flashinfer", infer)
    results = results_of(dataclasses.replace(FORWARD, mode=mode), *INSTALLED, watch=Counting())
    assert [row.status for row in results] == ["measured" if factor == 1.0 else "wrong"] * 2, results


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_pages_by_a_stand_in_of_flashinfer(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapper:
        def __init__(self, workspace: torch.Tensor, layout: str, *, use_tensor_cores: bool) -> None:
            assert (workspace.dtype, layout) == (torch.uint8, "NHD")

        def plan(
            self, ends: torch.Tensor, pages: torch.Tensor, last: torch.Tensor, heads: int, kv_heads: int, dim: int,
            size: int, *, sm_scale: float, q_data_type: torch.dtype, kv_data_type: torch.dtype,
        ) -> None:  # fmt: skip
            assert {tensor.dtype for tensor in (ends, pages, last)} == {torch.int32}
            assert (heads, kv_heads, dim, size) == (2, 1, 16, 16)
            self.given = [pages[a:b].long() for a, b in itertools.pairwise(ends.tolist())], last.tolist(), sm_scale

        def run(self, q: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            lines, last, scale = self.given
            found = []
            for query, pages, cut in zip(q, lines, last, strict=True):
                key, value = (each[pages].flatten(0, 1)[: len(pages) * 16 - 16 + cut] for each in cache)
                found.append(attention(query[None], key, value, scale, False)[0])
            return torch.stack(found) * factor

    library = ModuleType("flashinfer")
    monkeypatch.setattr(library, "BatchDecodeWithPagedKVCacheWrapper", Wrapper, raising=False)
    monkeypatch.setitem(sys.modules, "flashinfer", library)
    (rival,) = (each for each in SelectedProblem.implementations if each.name == "FlashInfer over pages")
    (result,) = results_of(SMOKE["selected tiny decode 96 x2 50% float32"], rival, watch=Counting())
    assert result.status == ("measured" if factor == 1.0 else "wrong"), result


def test_rivals_that_are_not_installed_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface", "flashinfer", "kernels"):
        monkeypatch.setitem(sys.modules, name, None)
    results = results_of(FORWARD, *INSTALLED)
    assert [(row.status, "installed" in row.reason) for row in results] == [("unavailable", True)] * 2


# Conditions


def test_clocks_are_asked_of_this_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "$@" >> "$0.asked"\necho "1980 MHz, 2619 MHz, 312.45 W, 41"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc-1"))
    told = conditions(torch.device("cuda:1"), FORWARD, "before")
    assert told == {
        "case": FORWARD.name, "when": "before", "clocks.sm": "1980 MHz", "clocks.mem": "2619 MHz",
        "power.draw": "312.45 W", "temperature.gpu": "41",
    }  # fmt: skip
    assert "--id=GPU-abc-1" in (tmp_path / "nvidia-smi.asked").read_text()
    assert conditions(torch.device("cpu"), FORWARD, "before") == {}
