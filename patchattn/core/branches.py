"""Which branch of a decoding variant runs in this thread."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_local = threading.local()  # .branch


def current_branch() -> int:
    """0 is the model itself; a decoding variant's branches are counted from 1."""
    return getattr(_local, "branch", 0)


@contextmanager
def running_branch(number: int) -> Iterator[None]:
    """The model is about to run as that branch."""
    before = current_branch()
    _local.branch = number
    try:
        yield
    finally:
        _local.branch = before
