"""The notebooks run, from the first cell to the last."""

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# The longest; what they show of training, calibration and new variants, other tests show as well.
LONG = ("2", "3", "4", "5", "6", "7", "8")


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output["text"] for output in outputs if output.get("name") == "stdout")


def test_there_are_eight() -> None:
    assert [path.name[0] for path in NOTEBOOKS] == list("12345678")


def marked(path: Path) -> Any:
    return pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.name.startswith(LONG) else ())


@pytest.mark.parametrize("path", map(marked, NOTEBOOKS))
def test_runs_from_any_folder(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("PATCHATTN_MODELS", str(tmp_path))  # a stand-in: real models take minutes
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)  # the last notebook runs tests of its own
    notebook = nbformat.read(path, as_version=4)
    committed = printed(notebook)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    now = printed(notebook)
    assert len(now.splitlines()) == len(committed.splitlines()), "what is committed is not what it prints now"
    assert "False" not in now  # restored, reloaded: the same
    assert "failed" not in now
