"""The runner of `patchattn eval`: the same answers after any kill and for any number of processes, and comparisons."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from transformers import LlamaForCausalLM

import patchattn
from patchattn.evaluation.run import compare as module
from patchattn.evaluation.run.compare import compare, evaluate, folder_name, processes
from patchattn.evaluation.tasks.task import EvalTask, Row

from .families import FAMILIES
from .test_longbench import BYTES


class Sums(EvalTask):
    """The sum of the logits after a few tokens, and a random number."""

    main_score = "sum"
    unit = ""

    def __init__(self, name: str = "sums", samples: int = 5) -> None:
        self.name, self.samples = name, samples
        self.calls: list[list[int]] = []
        self.stop_at: int | None = None
        self.width = 32

    def __len__(self) -> int:
        return self.samples

    def identity(self) -> Mapping[str, Any]:
        return {"samples of the task": self.samples}

    def check_model(self, model: Any, tokenizer: Any) -> None:
        if model.config.hidden_size != self.width:
            raise ValueError(f"the width must be {self.width}.")

    def answer(self, model: Any, tokenizer: Any, indices: Sequence[int]) -> list[Row]:
        assert not model.training
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append(list(indices))
        tokens = torch.tensor([[index + 1, index + 2, 3] for index in indices])
        with torch.no_grad():
            logits = model(tokens).logits
        return [{"sum": float(row.sum()), "drawn": float(torch.rand(()))} for row in logits]

    def score(self, rows: Sequence[Row]) -> dict[str, float]:
        return {"sum": sum(row["sum"] for row in rows), "nothing": float("nan")}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return FAMILIES["llama"].make()


def expected(model: LlamaForCausalLM, samples: int = 5) -> float:
    """One sample at a time, in float64."""
    with torch.no_grad():
        rows = [model(torch.tensor([[index + 1, index + 2, 3]])).logits.double().sum() for index in range(samples)]
    return float(sum(rows))


def file(folder: Path, task: str = "sums", process: int = 0) -> Path:
    return folder / task / f"process_{process}.jsonl"


def test_batches_scores_and_what_is_left_behind(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """The first batch is answered once before, for its times."""
    task, other = Sums(), Sums("others/more", samples=3)
    model.train()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    try:
        found = evaluate(model, BYTES, [task, other], tmp_path, batch=2)
        assert model.training
    finally:
        model.eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert task.calls == [[0, 1], [0, 1], [2, 3], [4]]
    assert other.calls == [[0, 1], [2]]
    assert found["sums"]["samples"] == 5
    assert found["sums"]["scores"] == {"sum": pytest.approx(expected(model), rel=1e-4), "nothing": None}
    assert found["others/more"]["scores"]["sum"] == pytest.approx(expected(model, 3), rel=1e-4)
    rows = [json.loads(line) for line in file(tmp_path).read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
    assert len({row["drawn"] for row in rows}) == 5
    assert file(tmp_path, "others/more").is_file()
    again = Sums()
    assert evaluate(model, BYTES, [again], tmp_path, batch=2)["sums"] == found["sums"]
    assert again.calls == []


@pytest.mark.parametrize("cut", [0, 5, 40])
def test_a_killed_run_ends_with_the_same_bytes(model: LlamaForCausalLM, tmp_path: Path, cut: int) -> None:
    """Cut in the middle of a line, too, and of a batch."""
    whole = evaluate(model, BYTES, [Sums()], tmp_path / "whole", batch=2)
    task, folder = Sums(), tmp_path / "killed"
    task.stop_at = 3  # after one for the times, and two that count
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, BYTES, [task], folder, batch=2)
    content = file(folder).read_bytes()
    file(folder).write_bytes(content[: len(content) - cut])
    task.stop_at = None
    task.calls.clear()
    assert evaluate(model, BYTES, [task], folder, batch=2) == whole
    assert task.calls == ([[2, 3], [2, 3], [4]] if cut else [[4], [4]])
    # of a batch that is half there, the half stays in the file, and is not read
    lines, expected_lines = (file(place).read_bytes().splitlines() for place in (folder, tmp_path / "whole"))
    assert set(lines) == set(expected_lines)
    assert lines == expected_lines or cut


def test_files_of_any_number_of_processes_are_read(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """Batches 0 and 2 are with the third of three processes, one of them cut off, and half of 1 with the second."""
    whole = evaluate(model, BYTES, [Sums()], tmp_path / "whole", batch=2)
    lines = file(tmp_path / "whole").read_bytes().splitlines(keepends=True)
    folder = tmp_path / "several"
    evaluate(model, BYTES, [Sums()], folder, batch=2)
    file(folder).unlink()
    file(folder, process=2).write_bytes(b"".join([*lines[:2], lines[4][:-9]]))
    file(folder, process=1).write_bytes(lines[3])
    task = Sums()
    assert evaluate(model, BYTES, [task], folder, batch=2) == whole
    assert task.calls == [[2, 3], [2, 3], [4]]
    file(folder, process=2).write_bytes(b"[]\n")
    with pytest.raises(ValueError, match=r"process_2\.jsonl, line 1: not an answer of such a run"):
        evaluate(model, BYTES, [task], folder, batch=2)


def test_every_process_answers_its_share(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes one after the other: the second finds nothing of its own, and everything of the first."""

    class State:
        num_processes = 2

        def __init__(self, index: int) -> None:
            self.process_index, self.is_main_process = index, index == 0

        def wait_for_everyone(self) -> None:
            pass

    whole = evaluate(model, BYTES, [Sums(samples=9)], tmp_path / "whole", batch=2)
    monkeypatch.setattr(module, "processes", lambda: State(0))
    first, second = Sums(samples=9), Sums(samples=9)
    with pytest.raises(ValueError, match=r"sums lacks the answers to 2 of 5 batches: is the output folder one"):
        evaluate(model, BYTES, [first], tmp_path, batch=2)
    assert first.calls == [[0, 1], [0, 1], [4, 5], [8]]
    monkeypatch.setattr(module, "processes", lambda: State(1))
    assert evaluate(model, BYTES, [second], tmp_path, batch=2) == whole
    assert second.calls == [[2, 3], [2, 3], [6, 7]]
    assert sorted(path.name for path in (tmp_path / "sums").iterdir()) == ["process_0.jsonl", "process_1.jsonl"]


def test_processes_that_do_not_know_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes().num_processes == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started"):
        processes()


def test_another_run_is_not_continued(model: LlamaForCausalLM, tmp_path: Path) -> None:
    evaluate(model, BYTES, [Sums()], tmp_path, batch=2)
    with pytest.raises(ValueError, match=r"sums holds a run with other settings \(batch: 2 became 3\)"):
        evaluate(model, BYTES, [Sums()], tmp_path, batch=3)
    with pytest.raises(ValueError, match="samples: 5 became 4"):
        evaluate(model, BYTES, [Sums()], tmp_path, batch=2, limit=4)
    with pytest.raises(ValueError, match=r"task\.samples of the task: 5 became 6"):
        evaluate(model, BYTES, [Sums("first"), Sums(samples=6)], tmp_path, batch=2)
    assert not file(tmp_path, "first").exists()  # refused before the first task is run
    with patchattn.patched(model, "ssa"):
        with pytest.raises(ValueError, match=r"patches: \[\] became .*'ssa'"):
            evaluate(model, BYTES, [Sums()], tmp_path, batch=2)
        evaluate(model, BYTES, [Sums()], tmp_path / "ssa")
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if ".patchattn." in name).add_(1)
        with pytest.raises(ValueError, match="patch_sha256"):  # trained on
            evaluate(model, BYTES, [Sums()], tmp_path / "ssa")


def test_what_is_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    for tasks, settings, message in (
        ([], {}, "at least one task"),
        ([Sums(samples=0)], {}, "sums has no samples"),
        ([Sums(), Sums()], {}, "sums is given 2 times"),
        ([Sums()], {"batch": 0}, "batch"),
        ([Sums()], {"bacth": 1}, "did you mean 'batch'"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(model, BYTES, tasks, tmp_path / "out", **settings)
    task = Sums()
    task.width = 16
    with pytest.raises(ValueError, match="width must be 16"):
        evaluate(model, BYTES, [task], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Comparison


def test_a_comparison(model: LlamaForCausalLM, tmp_path: Path) -> None:
    runs = {"half": {"moh": {"active_ratio": 0.5}}, "both": {"ssa": {}, "moh": {"active_ratio": 0.25}}}
    report = compare(model, BYTES, [Sums()], tmp_path, runs, batch=2, limit=3)
    assert list(report["runs"]) == ["unpatched", "half", "both"]
    task = report["tasks"]["sums"]
    assert task["samples"] == 3
    assert not patchattn.patch_info(model)["patches"]
    values = {"unpatched": expected(model, 3)}
    for name, run in runs.items():
        with patchattn.patched(model, list(run), next(iter(run.values())) if len(run) == 1 else run):
            values[name] = expected(model, 3)
            assert report["runs"][name]["patches"] == json.loads(json.dumps(patchattn.patch_info(model)["patches"]))
            assert report["runs"][name]["parameters"] == sum(p.numel() for p in model.parameters())
    assert len({round(value, 3) for value in values.values()}) == 3
    for name, value in values.items():
        assert task["runs"][name]["scores"]["sum"] == pytest.approx(value, rel=1e-4)
    for name in runs:
        change = task["runs"][name]["difference"]
        assert change == {"sum": pytest.approx(values[name] - values["unpatched"], rel=1e-3), "nothing": None}
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report))
    assert {path.name for path in tmp_path.iterdir()} >= {"unpatched", "half", "both", "report.md", "report.html"}


class Drawn(Sums):
    """Draws its answers."""

    def figure(self, rows: Mapping[str, Sequence[Row]]) -> Figure:
        self.drawn = {name: [row["sum"] for row in answers] for name, answers in rows.items()}
        return Figure()


def test_a_task_draws_the_answers_of_all_runs(model: LlamaForCausalLM, tmp_path: Path) -> None:
    task = Drawn("sums")
    report = compare(model, BYTES, [task, Sums("others")], tmp_path, {"half": {"moh": {"active_ratio": 0.5}}}, batch=2)
    for name, run in report["tasks"]["sums"]["runs"].items():
        assert len(task.drawn[name]) == len(task)
        assert sum(task.drawn[name]) == pytest.approx(run["scores"]["sum"])
    headings = re.findall(r"<h2>(.+?)</h2>", (tmp_path / "report.html").read_text())
    assert headings == ["Scores", "sums", "Scores and costs", "Every score", "How it was measured"]


def test_a_patched_model_and_itself_unpatched(model: LlamaForCausalLM, tmp_path: Path) -> None:
    with patchattn.patched(model, "moh", active_ratio=0.5):
        inside = expected(model)
        report = compare(model, BYTES, [Sums()], tmp_path)
        assert patchattn.patch_info(model)["patches"]
        assert expected(model) == inside
    runs = report["tasks"]["sums"]["runs"]
    assert runs["moh"]["scores"]["sum"] == pytest.approx(inside, rel=1e-4)
    assert runs["unpatched"]["scores"]["sum"] == pytest.approx(expected(model), rel=1e-4)


def test_a_saved_patch(saved: Any, tmp_path: Path) -> None:
    folder, _ = saved
    model = FAMILIES["llama"].make()
    report = compare(model, BYTES, [Sums()], tmp_path / "out", {"trained": str(folder)})
    found = report["tasks"]["sums"]["runs"]["trained"]["scores"]["sum"]
    patchattn.load_patch(model, folder)
    assert found == pytest.approx(expected(model), rel=1e-4)


def test_random_parameters_start_the_same_in_every_start(model: LlamaForCausalLM, tmp_path: Path) -> None:
    runs = {"routed": {"moh": {"router": "learned", "active_ratio": 0.5}}}
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(name) + seed + 17 * len(found))
        report = compare(model, BYTES, [Sums()], tmp_path / name, runs, seed=seed)
        found.append(report["tasks"]["sums"]["runs"]["routed"]["scores"]["sum"])
    assert found[0] == found[1] != found[2]


def test_comparisons_that_are_refused_before_anything_is_asked(model: LlamaForCausalLM, tmp_path: Path) -> None:
    task = Sums()
    for runs, message in (
        (None, "expects a patched model, or an unpatched one and runs; got neither"),
        ({}, "at least one run"),
        ({"unpatched": {"moh": {}}}, "another run has"),
        ({"a b": {"moh": {}}, "a_b": {"ssa": {}}}, "'a_b', which another run has"),
        ({"none": {}}, "at least one variant"),
        ({str(number): {"moh": {}} for number in range(6)}, "room for 5 runs"),
        ({"first": {"moh": {}}, "second": {"mho": {}}}, "did you mean 'moh'"),
        ({"saved": str(tmp_path / "nowhere")}, "nowhere"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(model, BYTES, [task], tmp_path / "out", runs)
    with patchattn.patched(model, "moh"), pytest.raises(ValueError, match="got a patched one and runs"):
        compare(model, BYTES, [task], tmp_path / "out", {"ssa": {"ssa": {}}})
    assert task.calls == []
    assert not patchattn.patch_info(model)["patches"]


def test_folders() -> None:
    assert folder_name("moh 75 %") == "moh_75"
    assert folder_name("ssa+moh") == "ssa+moh"
    assert folder_name("../up") == "up"
    assert os.sep not in folder_name("a/b")
