"""Fixtures of all tests."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import patchattn

from .behaviour import Case
from .saving import base, patch, run
from .toy import registered_toy

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes with all threads each are far slower than with one
    torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[Any]:
    """A test of a case on a model that needs what the variant says it lacks, or that a surgery has no layer to act on,
    ends with the refusal that names it."""
    try:
        return (yield)
    except Exception as error:  # of torch.compile, where it was that which was refused
        case = pyfuncitem.funcargs.get("case")
        if isinstance(case, Case) and f"The variant '{case.variant}' does not know the layer" in str(error):
            pytest.skip(f"refused: {error}")
        named = re.search(r"The variant '(\w+)' does not support ([\w, ]+), which", str(error))
        if not isinstance(case, Case) or named is None or named[1] != case.variant:
            raise
        if patchattn.variant_info(case.variant).capabilities & set(named[2].split(", ")):
            raise
        pytest.skip(f"refused, as {case.variant} says: {named[2]}")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with real data and small real models; tests that need it are skipped where it is not."""
    default = Path(__file__).parents[1] / ".." / "shared" / "data"
    folder = Path(os.environ.get("PATCHATTN_TEST_DATA", default)).resolve()
    if not folder.is_dir():
        pytest.skip(f"needs real data: no folder {folder} (set PATCHATTN_TEST_DATA)")
    return folder


@pytest.fixture
def toy(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a variant registered for one test; an indirect parameter says which capabilities it lacks."""
    with registered_toy(getattr(request, "param", frozenset())) as name:
        yield name


@pytest.fixture
def saved(tmp_path):
    """A folder with the patch of a patched Llama, and what that model computes."""
    model = patch(base())
    patchattn.save_patch(model, tmp_path / "patch")
    return tmp_path / "patch", run(model)
