"""What variants note of the latest pass of a vision encoder in this thread.

`generate` encodes images before the forwards that their tokens are read in, so that no run of a model holds both.
"""

import threading
from types import SimpleNamespace

_local = threading.local()  # by variant


def latest_pass(variant: str) -> SimpleNamespace:
    """What a variant, by its name, has noted of the latest pass; empty before it notes anything."""
    notes: SimpleNamespace = vars(_local).setdefault(variant, SimpleNamespace())
    return notes


def forget_pass(variant: str) -> None:
    """Let go of it: another pass begins, or a forward failed."""
    vars(_local).pop(variant, None)
