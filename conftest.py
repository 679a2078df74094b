"""Before any test imports Triton's kernels: without a GPU they run in Triton's interpreter."""

import gc
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def keep() -> None:
    """What there is stays to the end: no collection of garbage is to look through it."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    keep()  # thousands of tests, and imports


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is None or nextitem.path != item.path:
        keep()  # what compilers and other libraries have made for good


def pytest_sessionfinish() -> None:
    gc.unfreeze()
