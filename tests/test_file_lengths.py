"""No file of code grows beyond what one reads in one go."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ["patchattn", "kernels", "tests", "benchmarks", "recipes"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_is_longer_than_400_lines(folder: str) -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert lengths
    assert {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length > 400} == {}
