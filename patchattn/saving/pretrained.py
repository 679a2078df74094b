"""transformers' `from_pretrained`, whose many errors are here one: what cannot be loaded from where, and why."""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike, fspath
from typing import Any

import torch

from ..files.documents import quoted


def load_pretrained(auto_class: Any, model: str, **kwargs: Any) -> Any:
    """`from_pretrained` with a readable error.

    Raises:
        ValueError: nothing can be loaded from there.
    """
    with readable(model):
        return auto_class.from_pretrained(model, **kwargs)


@contextmanager
def readable(source: str | PathLike[str]) -> Iterator[None]:
    """Turn whatever transformers raises while it loads from `source` into a ValueError of one line.

    What it raises over a damaged file, a missing package or a value of the wrong type is of any kind, from KeyError to
    those of pickle. Running out of memory says nothing about the files and stays what it is.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, ValueError | TypeError | NotImplementedError) and fspath(source) in str(error):
            raise  # says where
        lines = [line.strip() for line in str(error).strip().split("\n") if line.strip()]
        reason = lines[0].rstrip(".")[:400] if lines else ""
        if not isinstance(error, ValueError | OSError):
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(
            f"Cannot load {quoted(fspath(source))}: expected the folder of a transformers model or its id on the Hub "
            f"({reason})."
        ) from error
