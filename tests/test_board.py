"""The board: rows on the same work, resumed and compared in pairs; what is wrong with its files is said first."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from patchattn.cli.main import main
from patchattn.evaluation.board.measured import Difference, pooled, read_rows
from patchattn.evaluation.board.plan import read_board
from patchattn.evaluation.board.sentences import shown
from patchattn.evaluation.board.show import board_table
from patchattn.evaluation.run import compare

from .test_longbench import BYTES, tiny_model

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "benchmarks" / "board"
PLAN: dict[str, Any] = {
    "model": "model",
    "tasks": {
        "longbench/passage_count": {"data": "mini", "limit": 2, "batch": 2, "max_length": 80},
        "perplexity": {"data": "text.txt", "max_length": 32, "parts": 3},
    },
    "speed": {"prompt_lengths": [16], "new_tokens": [4], "repeats": 1},
}
ROWS: dict[str, dict[str, Any]] = {
    "knorm-50": {"about": "half", "family": "caches", "variants": {"knorm": {"compression_ratio": 0.5}}},
    "tova-50": {
        "about": "half, behind the prompt",
        "family": "caches",
        "variants": {"tova": {"compression_ratio": 0.5}},
        "behind_prompt": True,
    },
    "moh": {"about": "half of the heads", "family": "heads", "variants": {"moh": {"active_ratio": 0.5}}},
    "streaming": {"about": "eight keys", "family": "selection", "variants": {"streaming": {"sinks": 2, "recent": 6}}},
    "too_deep": {"about": "no such layer", "family": "heads", "variants": {"heads": {"heads": [[9, 0]]}}},
}
KILLED = """
import os, signal, sys
from patchattn.cli.main import main
from patchattn.evaluation.run import compare

asked, ask = [], compare._ask

def answered(*given):
    asked.append(given)
    if len(asked) == 6 and os.environ["RANK"] == sys.argv[-1]:  # behind dense, in a row
        os.kill(os.getpid(), signal.SIGKILL)
    return ask(*given)

compare._ask = answered
main(sys.argv[1:-1])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model_and_data(tmp_path)
    write(tmp_path / "board", PLAN, ROWS)
    return tmp_path


def write_model_and_data(folder: Path) -> None:
    tiny_model().save_pretrained(folder / "model")
    BYTES.save_pretrained(folder / "model")
    (folder / "mini").mkdir()
    mini = {str(index): {"origin_prompt": f"How many {'word ' * 30}{'?' * index}", "gold": ["3"]} for index in range(3)}
    (folder / "mini" / "passage_count.json").write_text(json.dumps(mini))
    (folder / "text.txt").write_text("Once upon a time there was a patch. " * 6)


def write(folder: Path, plan: Any, rows: dict[str, Any]) -> None:
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    (folder / "board.yaml").write_text(yaml.safe_dump(plan))
    for name, row in rows.items():
        (folder / "rows" / f"{name}.yaml").write_text(yaml.safe_dump(row))


def run(folder: Path, *arguments: str) -> int:
    places = ["--model", str(folder / "model"), "--data", str(folder), "--output", str(folder / "out")]
    with pytest.raises(SystemExit) as left:
        main(["board", "run", str(folder / "board"), *places, *arguments])
    return left.value.code or 0  # type: ignore[return-value]


def test_a_board_is_run_resumed_and_shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "--row", "streaming", "--only", "quality") == 0
    assert sorted(path.stem for path in (folder / "out" / "rows").iterdir()) == ["dense", "streaming"]
    assert not (folder / "out" / "speed").exists()

    asked: list[str] = []
    evaluate = compare.evaluate

    def noted(model: Any, tokenizer: Any, tasks: Any, output: Path, **settings: Any) -> Any:
        asked.append(output.name)
        if len(asked) == 3:  # killed in the middle of a row
            raise KeyboardInterrupt
        return evaluate(model, tokenizer, tasks, output, **settings)

    monkeypatch.setattr("patchattn.evaluation.board.run.evaluate", noted)
    assert run(folder) == 130
    assert not (folder / "out" / "rows" / "moh.json").exists()
    assert run(folder, "--row", "moh", "--row", "knorm-50", "--row", "tova-50", "--row", "too_deep") == 0
    assert set(asked) == {"knorm-50", "moh", "tova-50"}  # dense and streaming were there

    rows = read_rows(folder / "out")
    assert next(iter(rows)) == "dense"
    assert {row["model"]["name"] for row in rows.values()} == {"model"}  # not the folder's place on this machine
    assert "layer" in rows["too_deep"]["refused"]
    assert "layer" in rows["too_deep"]["speed"]["refused"]
    assert "dropped between calls" in rows["knorm-50"]["tasks"]["perplexity"]["refused"]
    assert rows["tova-50"]["tasks"]["perplexity"] == {"as_dense": True}
    assert rows["knorm-50"]["tasks"]["longbench/passage_count"]["cache_ratio"] > 0  # spare room is more than the texts
    assert rows["moh"]["parameters"] >= rows["dense"]["parameters"]
    assert 0 < rows["streaming"]["density"]["prompt"] < 1
    assert rows["moh"]["density"] == {}
    assert rows["streaming"]["speed"] is None  # quality alone
    for key, ratio in rows["moh"]["speed"]["ratio"].items():
        assert 0 < ratio["least"] <= ratio["median"] <= ratio["greatest"], key

    # of the files with the answers alone: the same scores and differences
    dense, moh = (loss(folder / "out" / "answers" / name / "perplexity") for name in ("dense", "moh"))
    found = rows["moh"]["tasks"]["perplexity"]
    assert found["score"] == pytest.approx(math.exp(moh))
    assert found["difference"] == pytest.approx(math.exp(moh) - math.exp(dense))
    assert found["difference_error"] > 0

    head, lines = board_table(rows)
    assert [line[0] for line in lines][:1] == ["dense"]
    assert {line[0] for line in lines} == {"dense", "knorm-50", "tova-50", "moh", "streaming"}
    assert head[3] == "longbench/passage_count"
    by_name = {line[0]: dict(zip(head, line, strict=True)) for line in lines}
    assert by_name["knorm-50"]["perplexity, minus dense"] == "refused"
    assert by_name["tova-50"]["perplexity, minus dense"] == "= dense"
    assert by_name["streaming"]["decode"] == "-"
    page = folder / "board.md"
    write(folder / "board", PLAN, {"later": ROWS["moh"]})
    options = ["--plan", str(folder / "board"), "--page", str(page), "--pictures", str(folder / "pictures")]
    with pytest.raises(SystemExit):
        main(["board", "show", str(folder / "out"), *options])
    text = page.read_text()
    assert "| dense |" in text
    assert "| Refused: " in text
    assert "Not run yet: later." in text
    assert "](pictures/caches.png)" in text
    assert (folder / "pictures" / "caches.png").stat().st_size > 1000

    write(folder / "board", PLAN | {"seed": 1}, {})
    capsys.readouterr()
    assert run(folder) == 2
    assert "measured by another plan" in capsys.readouterr().err


def several(folder: Path, processes: int, *, killed: int | None) -> subprocess.CompletedProcess[str]:
    """The board as `accelerate launch` starts it, one of whose processes may be killed."""
    script = folder / "killed.py"
    script.write_text(KILLED)
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone", str(script)]
    places = ["--model", str(folder / "model"), "--data", str(folder), "--output", str(folder / "several")]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels" / "torch-ext")])
    return subprocess.run(
        [sys.executable, *launch, "board", "run", str(folder / "board"), *places, str(killed)],
        env={**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_two_processes_of_which_one_was_killed_and_then_three_are_one(folder: Path) -> None:
    tasks = {**PLAN["tasks"], "perplexity": {**PLAN["tasks"]["perplexity"], "parts": 7, "batch": 1}}
    write(folder / "board", {**PLAN, "tasks": tasks}, ROWS)
    assert run(folder) == 0
    assert several(folder, 2, killed=1).returncode != 0
    out = folder / "several"
    there = {path.stem for path in (out / "rows").iterdir()}
    assert "dense" in there
    assert there < {"dense", *ROWS}
    before = {path: path.read_bytes() for path in out.rglob("*.json*")}

    done = several(folder, 3, killed=None)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("dense, rows: is there") == 1  # one process speaks
    for path, content in before.items():  # all but a last line that was cut off
        assert path.read_bytes().startswith(content[: content.rfind(b"\n") + 1]), path
    for name in ("dense", *ROWS):
        one, three = (json.loads((where / "rows" / f"{name}.json").read_text()) for where in (folder / "out", out))
        assert (one["processes"], three["processes"] in (2, 3)) == (1, True)
        for key in ("tasks", "refused", "density", "parameters"):
            assert one.get(key) == three.get(key), (name, key)
        if name != "dense":
            assert (out / "speed" / f"{name}.json").is_file()
    for task, samples in (("perplexity", 7), ("longbench/passage_count", 2)):
        files = (out / "answers" / "moh" / task).glob("process_*.jsonl")
        rows = [json.loads(line) for path in files for line in path.read_text().splitlines()]
        assert sorted(row["index"] for row in rows) == list(range(samples))


def test_times_are_measured_alone(folder: Path) -> None:
    assert run(folder, "--row", "moh", "--only", "speed") == 0
    assert [path.name for path in (folder / "out").iterdir()] == ["speed"]
    assert run(folder, "--only", "times") == 2


def test_a_row_that_changes_what_is_read_of_a_prompt_is_not_behind_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder / "board", PLAN, {"streaming": ROWS["streaming"] | {"behind_prompt": True}})
    assert run(folder, "--row", "streaming", "--only", "quality") == 2
    assert "streaming: is said to act behind a prompt, and changes what is read" in capsys.readouterr().err


def loss(folder: Path) -> float:
    """Nats a token, from the lines of a run's answers."""
    rows = [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    return sum(row["nll"] for row in rows) / sum(row["tokens"] for row in rows)


def test_the_mean_of_differences_and_its_error() -> None:
    tasks = {
        "a": {"unit": "%", "difference": -10.0, "difference_error": 3.0},
        "b": {"unit": "%", "difference": 4.0, "difference_error": 4.0},
        "c": {"unit": "", "difference": 99.0, "difference_error": 1.0},
        "d": {"refused": "why"},
    }
    assert pooled({"tasks": tasks}, ["a", "b", "d"]) == Difference(-3.0, 2.5)
    assert pooled({"tasks": tasks}, ["d"]) is None
    as_dense = {"tasks": tasks | {"d": {"as_dense": True}}}
    assert pooled(as_dense, ["a", "b", "d"]) == Difference(-2.0, 5 / 3)


def test_what_is_shown_is_more_than_twice_its_error() -> None:
    dense = {"parameters": 100, "tasks": {"a": {"unit": "%"}, "p": {"unit": "", "higher_is_better": False}}}
    row = {
        "parameters": 75,
        "measured": {"row": {}},
        "density": {},
        "tasks": {
            "a": {"difference": -10.0, "difference_error": 6.0},
            "p": {"difference": 3.0, "difference_error": 1.0},
        },
    }
    assert shown("x", row, dense) == (
        "mean of tasks: no difference shown (-10.00 ± 6.00 points); p: worse by +3.00 ± 1.00; 75 % of the parameters."
    )
    row["tasks"]["a"]["difference_error"] = 4.0
    assert shown("x", row, dense).startswith("mean of tasks: worse by -10.00 ± 4.00 points; apart: a -10.00 ± 4.00; p")


@pytest.mark.parametrize(
    ("plan", "rows", "message"),
    [
        ({"tasks": {"perplexity": {"limit": 0}}}, {}, "limit of perplexity must be a whole number"),
        ({"tasks": {"perplexity": {"batch": "2"}}}, {}, "batch of perplexity must be a whole number"),
        ({"dtype": "int8"}, {}, "dtype"),
        ({"tasks": {"longbench": {}}}, {}, "longbench is a benchmark of several tasks"),
        ({"tasks": {"speed": {}}}, {}, "speed is no task of a board"),
        ({"tasks": {"perplexity": 3}}, {}, "must map names to values"),
        ({"tasks": {"perplexty": {}}}, {}, "did you mean 'perplexity'?"),
        ({}, {"x": {"about": "", "family": "", "variants": {}}}, "rows/x.yaml: A row needs variants or a patch"),
        ({}, {"x": {"about": "", "family": "", "variants": {"mho": {}}}}, "did you mean 'moh'?"),
        ({}, {"dense": ROWS["moh"]}, "is not 'dense'"),
        ({}, {"x": {"about": ""}}, "family must be given"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, plan: Any, rows: Any, message: str) -> None:
    write(tmp_path, PLAN | plan, {"moh": ROWS["moh"], **rows})
    with pytest.raises((TypeError, ValueError), match=message):
        read_board(tmp_path)


def test_an_unknown_row_and_no_rows(tmp_path: Path) -> None:
    write(tmp_path, PLAN, {"moh": ROWS["moh"]})
    with pytest.raises(ValueError, match="no row 'mho'; did you mean 'moh'"):
        read_board(tmp_path, ["mho"])
    with pytest.raises(ValueError, match="run `patchattn board run` first"):
        read_rows(tmp_path)


def test_full_is_another_plan_on_the_same_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--full") == 2
    assert "no configuration" in capsys.readouterr().err
    plan = PLAN | {"tasks": {"perplexity": {"data": "text.txt", "max_length": 16, "parts": 2}}}
    (folder / "board" / "full.yaml").write_text(yaml.safe_dump(plan))
    assert run(folder, "--full", "--row", "moh", "--only", "quality") == 0
    assert set(read_rows(folder / "out")["moh"]["tasks"]) == {"perplexity"}
    assert run(folder, "--row", "moh") == 2
    assert "measured by another plan" in capsys.readouterr().err


def test_the_shipped_full_plan_has_tasks_that_there_are() -> None:
    plan, rows = read_board(SHIPPED, full=True)
    assert rows.keys() == read_board(SHIPPED)[1].keys()
    assert plan.limit("longbench/gov_report") == 20
    assert plan.settings_of("ruler/vt")["lengths"] == [1024, 2048, 4096]


def test_the_shipped_board_can_be_read(data_dir: Path) -> None:
    plan, rows = read_board(SHIPPED)
    assert {row.family for row in rows.values()} >= {"caches", "selection", "heads"}
    samples = {task.name: plan.limit(task.name) or len(task) for task in plan.made_tasks(data_dir)}
    assert samples["glue/sst2"] == 100
    assert samples["ruler/vt"] == 6
    assert sum(row.behind_prompt for row in rows.values()) >= 13


def test_times_of_another_row_are_not_joined(tmp_path: Path) -> None:
    for folder, digest in (("rows", "a"), ("speed", "b")):
        (tmp_path / folder).mkdir()
        row = {"patch": "runs/mine", "sha256": digest}
        (tmp_path / folder / "mine.json").write_text(json.dumps({"name": "mine", "measured": {"row": row}}))
    with pytest.raises(ValueError, match=r"mine\.json is of another row than .*a patch that was saved anew"):
        read_rows(tmp_path)
