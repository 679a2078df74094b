"""Fixtures of all tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import patchattn

from .behaviour import without_full
from .mutation import Mutant
from .saving import base, patch, run
from .toy import registered_toy
from .toys import registered_toys

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes with all threads each are far slower than with one
    torch.set_num_threads(1)

settings.register_profile("no deadline", deadline=None)  # a busy machine fails no test
settings.load_profile("no deadline")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mutate", metavar="VARIANT.STAGE", help="multiply what a variant changes: its tests must fail")


def pytest_configure(config: pytest.Config) -> None:
    if mutate := config.getoption("--mutate"):
        config.pluginmanager.register(Mutant(*mutate.split(".")))


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Where nothing marked `full` is asked for, it is not made: there is more of it than of all else."""
    asked = metafunc.config.option.markexpr
    if "not full" in asked and " or " not in asked:
        metafunc.definition.own_markers = [without_full(mark) for mark in metafunc.definition.own_markers]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with real data and small real models; tests that need it are skipped where it is not."""
    default = Path(__file__).parents[1] / ".." / "shared" / "data"
    folder = Path(os.environ.get("PATCHATTN_TEST_DATA", default)).resolve()
    if not folder.is_dir():
        pytest.skip(f"needs real data: no folder {folder} (set PATCHATTN_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """Folder with plain checkpoints of published models, named as on the Hub; what needs it is skipped without."""
    folder = os.environ.get("PATCHATTN_MODELS")
    if folder is None or not Path(folder).is_dir():
        pytest.skip(f"needs published models: PATCHATTN_MODELS names no folder, but {folder}")
    return Path(folder)


@pytest.fixture
def toy(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a variant registered for one test; an indirect parameter says which capabilities it lacks."""
    with registered_toy(getattr(request, "param", frozenset())) as name:
        yield name


@pytest.fixture
def toys() -> Iterator[None]:
    """All variants of `toys.py`, registered for one test."""
    with registered_toys():
        yield


@pytest.fixture
def saved(tmp_path):
    """A folder with the patch of a patched Llama, and what that model computes."""
    model = patch(base())
    patchattn.save_patch(model, tmp_path / "patch")
    return tmp_path / "patch", run(model)
