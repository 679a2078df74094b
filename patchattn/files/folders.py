"""Folders whose files change together: a killed save leaves the old files or the new ones, never some of each.

A save writes into a folder inside the folder (`.patchattn-unfinished-*`). When all is there, renaming that to
`.patchattn-complete-*` is the moment from which the new files count; they are then moved to their places. What a kill
interrupts before that moment, the next save deletes; after it, the next save or reading finishes.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

T = TypeVar("T")
_UNFINISHED, _COMPLETE = ".patchattn-unfinished-", ".patchattn-complete-"
_FILES, _OUTDATED, _REMOVED = "files", "outdated.json", "removed"
_ATTEMPTS = 5


@contextmanager
def replacing(folder: str | os.PathLike[str], outdated: Callable[[str], bool] = lambda name: False) -> Iterator[Path]:
    """An empty folder to write into, whose files replace those of `folder` when the `with` block ends without an error.

    Other files of the folder stay. One process saves into a folder at a time; another may read it with `settled`.

    Args:
        folder: is made if it does not exist.
        outdated: whether a file of that name goes where it is not written anew, such as a shard of an earlier save.

    Raises:
        ValueError: `folder` is a file.
        OSError: it could not be written, or another process saved there at the same time. It then holds what it held.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{folder} must be a folder, got a file.") from error
    settle(folder)
    for left in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(left, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
    try:
        files = staging / _FILES
        files.mkdir()
        (staging / _REMOVED).mkdir()
        yield files
        names = {path.name for path in folder.iterdir() if not path.is_dir() and outdated(path.name)}
        names -= {path.name for path in files.iterdir()}
        (staging / _OUTDATED).write_text(json.dumps(sorted(names)), encoding="utf-8")
        os.rename(staging, folder / staging.name.replace(_UNFINISHED, _COMPLETE))
    except BaseException as error:
        is_there = staging.is_dir()
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError) and not is_there:
            raise OSError(f"Another process saved into {folder} at the same time: save from one of them.") from error
        if isinstance(error, SafetensorError):
            raise OSError(f"{folder} could not be written: {error}. Its content is unchanged.") from error
        raise
    settle(folder)


def settle(folder: Path) -> None:
    """Finish a save that was interrupted when all its files were there.

    Raises:
        ValueError: this process must not write there.
    """
    for complete in sorted(folder.glob(f"{_COMPLETE}*")):
        try:
            _finish(folder, complete)
        except OSError as error:
            raise ValueError(
                f"A save into {folder} was interrupted and cannot be finished: {error.strerror}. Load it once where "
                "the folder can be written."
            ) from error


def settled(folder: Path, read: Callable[[], T]) -> T:
    """What `read` makes of the files of a folder, all from one save, also while another process saves there.

    Raises:
        ValueError: it is written all the time; and whatever `read` raises.
    """
    cause = None
    for _ in range(_ATTEMPTS):
        settle(folder)
        before = _state(folder)
        if before is None:
            continue
        try:
            found = read()
        except (ValueError, TypeError, NotImplementedError, OSError) as error:  # how files of two saves are refused
            if _state(folder) == before:
                raise
            cause = error
            continue
        if _state(folder) == before:
            return found
    raise ValueError(
        f"{folder} was rewritten during each of {_ATTEMPTS} attempts to read it: read it once nothing writes to it."
    ) from cause


def _finish(folder: Path, complete: Path) -> None:
    """Move the files of a complete save to their places.

    Several processes may do so at once: each file is moved by one of them, and the first to have seen all of them moved
    takes the rest away. What is outdated goes into the save's own folder, so that a process that comes too late removes
    nothing of a later save.
    """
    removed, files = complete / _REMOVED, complete / _FILES
    with suppress(FileNotFoundError):
        names = json.loads((complete / _OUTDATED).read_text(encoding="utf-8"))
        for name in names:
            with suppress(FileNotFoundError):
                os.replace(folder / name, removed / name)
        for path in sorted(files.rglob("*")):
            if not path.is_dir():
                target = folder / path.relative_to(files)
                target.parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):
                    os.replace(path, target)
    shutil.rmtree(complete, ignore_errors=True)


def _state(folder: Path) -> list[tuple[str, int, int, int]] | None:
    """What every file that a save moves changes; `None` while one is moving them.

    Of links themselves: they are what a save replaces, and may lead nowhere.
    """
    found = []
    for entry in os.scandir(folder):
        if entry.name.startswith(_COMPLETE):
            return None
        if entry.name.endswith((".json", ".safetensors")):
            try:
                about = entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # just moved away
                return None
            found.append((entry.name, about.st_ino, about.st_mtime_ns, about.st_size))
    return sorted(found)
