"""Fixtures of all tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with real data and small real models; tests that need it are skipped where it is not."""
    default = Path(__file__).parents[1] / ".." / "shared" / "data"
    folder = Path(os.environ.get("PATCHATTN_TEST_DATA", default)).resolve()
    if not folder.is_dir():
        pytest.skip(f"needs real data: no folder {folder} (set PATCHATTN_TEST_DATA)")
    return folder
