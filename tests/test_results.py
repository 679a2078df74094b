"""Results files: what is read back, and what is not a row of a run."""

import json
from pathlib import Path

import pytest

from patchattn.evaluation.tasks.results import claim, read_done

REQUESTS = [{"id": 0}, {"id": 1}, {"id": 2}]


def test_answers_may_hold_any_break(tmp_path: Path) -> None:
    """Python takes more signs for the end of a line than JSON lines have."""
    path = tmp_path / "a.jsonl"
    rows = [{"id": index, "pred": text} for index, text in enumerate(["a\u2028b\x85c\x0bd", "\r\n"])]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="")
    assert read_done(path, REQUESTS, "pred") == rows
    assert read_done(tmp_path / "none.jsonl", REQUESTS, "pred") == []


def test_a_line_that_was_cut_off_is_cut_off_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 0, "pred": "x"}\n{"id": 1, "pr')
    assert read_done(path, REQUESTS, "pred") == [{"id": 0, "pred": "x"}]
    assert path.read_text() == '{"id": 0, "pred": "x"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{\n", "line 1: not an answer"),
        ("3\n", "line 1: not an answer"),
        ('{"id": 0}\n', "line 1: not an answer"),
        ('{"pred": "x"}\n', "line 1: the answer to another request"),
        ('{"id": 0, "pred": "x"}\n{"id": 2, "pred": "x"}\n', "line 2: the answer to another request"),
        ('{"id": 0, "pred": "x"}\n' * 4, "holds 4 answers to 3 requests"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_done(path, REQUESTS, "pred")


def test_a_file_belongs_to_one_run(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    claim(path, {"batch": 1, "classes": ("x",)})
    claim(path, {"batch": 1, "classes": ["x"]})
    with pytest.raises(ValueError, match=r"other settings \(batch: 1 became 2; classes: \['x'\] became None\)"):
        claim(path, {"batch": 2})
    path.write_text("")
    path.with_name("a.jsonl.settings.json").unlink()
    with pytest.raises(ValueError, match=r"has no a\.jsonl\.settings\.json"):
        claim(path, {"batch": 1})
