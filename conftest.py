"""Before any test imports Triton's kernels: without a GPU they run in Triton's interpreter."""

import gc
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish() -> None:
    """Thousands of tests and all imports stay to the end: no collection of garbage is to look through them."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()
