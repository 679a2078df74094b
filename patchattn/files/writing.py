"""Single files, written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def taking_place(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write what takes the place of a file at once, when the `with` block ends without an error.

    A killed process leaves the file of before; what it leaves beside it, the next call overwrites. A link is replaced,
    wherever it leads: what it led to may be others' too, as in the Hub's cache. Devices and pipes are written to.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        yield path
        return
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)  # as a link it would be followed
    try:
        yield part
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    os.replace(part, path)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text, in UTF-8, as `taking_place` says."""
    with taking_place(path) as place:
        place.write_text(text, encoding="utf-8")
