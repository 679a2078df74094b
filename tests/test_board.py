"""The board: rows on the same work, resumed and compared in pairs; what is wrong with its files is said first."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from patchattn.cli.main import main
from patchattn.evaluation.board.plan import read_board
from patchattn.evaluation.board.show import board_table, pooled, read_rows
from patchattn.evaluation.run import compare

from .test_longbench import BYTES, tiny_model

SHIPPED = Path(__file__).parents[1] / "benchmarks" / "board"
PLAN: dict[str, Any] = {
    "model": "model",
    "batch": 2,
    "tasks": {
        "longbench/passage_count": {"data": "mini", "limit": 2, "max_length": 40},
        "perplexity": {"data": "text.txt", "max_length": 32, "parts": 3},
    },
    "speed": {"prompt_lengths": [16], "new_tokens": [4], "repeats": 1},
}
ROWS: dict[str, dict[str, Any]] = {
    "knorm-50": {"about": "half", "family": "caches", "variants": {"knorm": {"compression_ratio": 0.5}}},
    "moh": {"about": "half of the heads", "family": "heads", "variants": {"moh": {"active_ratio": 0.5}}},
    "streaming": {"about": "eight keys", "family": "selection", "variants": {"streaming": {"sinks": 2, "recent": 6}}},
    "too_deep": {"about": "no such layer", "family": "heads", "variants": {"heads": {"heads": [[9, 0]]}}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    BYTES.save_pretrained(tmp_path / "model")
    (tmp_path / "mini").mkdir()
    mini = {str(index): {"origin_prompt": f"How many {'?' * index}", "gold": ["3"]} for index in range(3)}
    (tmp_path / "mini" / "passage_count.json").write_text(json.dumps(mini))
    (tmp_path / "text.txt").write_text("Once upon a time there was a patch. " * 6)
    write(tmp_path / "board", PLAN, ROWS)
    return tmp_path


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
    assert run(folder, "--row", "streaming") == 0
    assert sorted(path.stem for path in (folder / "out" / "rows").iterdir()) == ["dense", "streaming"]

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
    assert run(folder) == 0
    assert set(asked) == {"knorm-50", "moh"}  # dense and streaming were there

    rows = read_rows(folder / "out")
    assert next(iter(rows)) == "dense"
    assert "layer" in rows["too_deep"]["refused"]
    assert "dropped between calls" in rows["knorm-50"]["tasks"]["perplexity"]["refused"]
    assert (
        rows["knorm-50"]["tasks"]["longbench/passage_count"]["cache_ratio"] > 0
    )  # spare room is more than these texts
    assert rows["moh"]["parameters"] >= rows["dense"]["parameters"]
    assert 0 < rows["streaming"]["density"] < 1
    assert rows["moh"]["density"] is None

    # of the files with the answers alone: the same scores and differences
    dense, moh = (loss(folder / "out" / "answers" / name / "perplexity") for name in ("dense", "moh"))
    found = rows["moh"]["tasks"]["perplexity"]
    assert found["score"] == pytest.approx(math.exp(moh))
    assert found["difference"] == pytest.approx(math.exp(moh) - math.exp(dense))
    assert found["difference_error"] > 0

    head, lines = board_table(rows)
    assert [line[0] for line in lines] == ["dense", "knorm-50", "moh", "streaming"]
    assert head[3] == "longbench/passage_count"
    assert lines[1][4] == "refused"
    page = folder / "board.md"
    with pytest.raises(SystemExit):
        main(["board", "show", str(folder / "out"), "--page", str(page), "--picture", str(page.with_suffix(".svg"))])
    text = page.read_text()
    assert "| dense |" in text
    assert "- too_deep, the model: " in text
    assert "![Mean difference to dense over the cache's size](board.svg)" in text
    assert (folder / "board.svg").stat().st_size > 1000

    write(folder / "board", PLAN | {"seed": 1}, {})
    capsys.readouterr()
    assert run(folder) == 2
    assert "measured by another plan" in capsys.readouterr().err


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
    assert pooled({"tasks": tasks}) == (-3.0, 2.5)
    assert pooled({"tasks": {"d": tasks["d"]}}) is None


@pytest.mark.parametrize(
    ("plan", "rows", "message"),
    [
        ({"tasks": {"perplexity": {"limit": 0}}}, {}, "limit of perplexity must be a whole number"),
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


def test_the_shipped_board_can_be_read(data_dir: Path) -> None:
    plan, rows = read_board(SHIPPED)
    assert {row.family for row in rows.values()} >= {"caches", "selection", "heads"}
    samples = {task.name: plan.limit(task.name) or len(task) for task in plan.made_tasks(data_dir)}
    assert samples["glue/sst2"] == 200
    assert samples["ruler/vt"] == 10
