"""Folders whose files change together."""

import contextlib
import errno
import functools
import os
import shutil
import threading

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from patchattn.files import folders
from patchattn.files.documents import read_json, write_json
from patchattn.files.folders import replacing, settle, settled
from patchattn.files.tensors import write_tensors


class Killed(BaseException):
    """What stands for SIGKILL: nothing after it runs."""


def content(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def write(folder, text, names=("a.json", "b.safetensors", "sub/c"), **kwargs):
    with replacing(folder, **kwargs) as staging:
        for name in names:
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_text(text)


def test_files_take_the_place_of_others(tmp_path):
    folder = tmp_path / "new" / "folder"
    write(folder, "old")
    (folder / "other").write_text("stays")
    write(folder, "new", ["a.json", "sub/c"])
    assert content(folder) == {"a.json": "new", "b.safetensors": "old", "other": "stays", "sub/c": "new"}


def test_outdated_files_go(tmp_path):
    write(tmp_path, "old", ["shard-1", "shard-2", "other"])
    write(tmp_path, "new", ["shard-1"], outdated=lambda name: name.startswith("shard"))
    assert content(tmp_path) == {"other": "old", "shard-1": "new"}


def write_and_raise(folder, error):
    with replacing(folder) as staging:
        (staging / "a.json").write_text("new")
        raise error


def test_an_error_leaves_the_folder_as_it_was(tmp_path):
    write(tmp_path, "old")
    before = content(tmp_path)
    with pytest.raises(ZeroDivisionError):
        write_and_raise(tmp_path, ZeroDivisionError())
    with pytest.raises(OSError, match=r"could not be written: no space left\. Its content"):
        write_and_raise(tmp_path, SafetensorError("no space left"))
    with pytest.raises(OSError, match="No space"):
        write_and_raise(tmp_path, OSError(errno.ENOSPC, "No space left on device"))
    assert content(tmp_path) == before
    with pytest.raises(ValueError, match="must be a folder, got a file"):
        write(tmp_path / "a.json", "x")
    with pytest.raises(ValueError, match="must be a folder, got a file"):
        write(tmp_path / "a.json" / "x", "x")


def run_until(monkeypatch, number, save):
    """Save, and stop at the given one of the calls that change the folder; whether there were so many."""
    count = 0

    def counted(original):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count > number:
                raise Killed
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        for name in ("rename", "replace"):
            patched.setattr(folders.os, name, counted(getattr(os, name)))
        patched.setattr(folders.shutil, "rmtree", counted(shutil.rmtree))
        try:
            save()
        except Killed:
            return True
    return False


def test_stopped_anywhere_a_save_leaves_the_old_files_or_the_new(tmp_path, monkeypatch):
    seen = []
    outdated = {"outdated": lambda name: name.startswith("shard")}
    old = {"a.json": "old", "shard-1": "old", "shard-2": "old", "sub/c": "old"}
    new = {"a.json": "new", "shard-1": "new", "sub/c": "new"}
    for steps in range(100):
        folder = tmp_path / str(steps)
        write(folder, "old", list(old))
        save = functools.partial(write, folder, "new", list(new), **outdated)
        was_stopped = run_until(monkeypatch, steps, save)
        found = settled(folder, functools.partial(content, folder))
        visible = {name: text for name, text in found.items() if not name.startswith(".")}
        assert visible in (old, new), steps
        seen.append(visible == new)
        write(folder, "newest", list(new), **outdated)
        assert content(folder) == dict.fromkeys(new, "newest")  # nothing is left of the one that was stopped
        if not was_stopped:
            break
    assert 6 <= steps < 99
    assert seen == sorted(seen)  # there is one moment from which the new files count
    assert not seen[0]
    assert seen[-1]


def test_an_interrupted_save_in_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    write(tmp_path, "old")
    assert run_until(monkeypatch, 2, lambda: write(tmp_path, "new"))

    def refuse(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(folders.os, "replace", refuse)
    with pytest.raises(ValueError, match="interrupted and cannot be finished: Permission denied"):
        settled(tmp_path, lambda: None)


def test_a_reader_beside_a_writer_sees_one_save(tmp_path):
    write(tmp_path, "0")
    stop, failures = threading.Event(), []

    def save():
        number = 0
        while not stop.is_set():
            number += 1
            try:
                write(tmp_path, str(number))
            except Exception as error:
                failures.append(error)

    writer = threading.Thread(target=save)
    writer.start()
    seen, names = set(), ("a.json", "b.safetensors", "sub/c")
    try:
        for _ in range(1000):
            with contextlib.suppress(ValueError):  # the writer may be faster each time, which is said, not guessed
                found = settled(tmp_path, lambda: [(tmp_path / name).read_text() for name in names])
                assert len(set(found)) == 1, found
                seen.add(found[0])
    finally:
        stop.set()
        writer.join()
    assert not failures
    assert len(seen) > 3


def test_two_writers_at_once_are_told(tmp_path):
    write(tmp_path, "old")

    def both():
        with replacing(tmp_path) as first:
            (first / "a.json").write_text("first")
            write(tmp_path, "second")

    with pytest.raises(OSError, match=r"Another process saved into .* at the same time"):
        both()
    assert content(tmp_path) == dict.fromkeys(("a.json", "b.safetensors", "sub/c"), "second")


def test_a_file_in_the_way_of_a_folder_loses_nothing(tmp_path):
    (tmp_path / "inner").write_text("in the way")
    with pytest.raises(ValueError, match="interrupted and cannot be finished"):
        write(tmp_path, "1", ["inner/a.json"])
    (tmp_path / "inner").unlink()
    settle(tmp_path)
    assert (tmp_path / "inner" / "a.json").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["inner"]


@pytest.mark.parametrize("leads", ["nowhere", "to a file"])
def test_links_are_replaced_not_followed(tmp_path, leads):
    folder, elsewhere = tmp_path / "saved", tmp_path / "elsewhere"
    folder.mkdir()
    if leads == "to a file":
        elsewhere.write_text("another's")
    for name in ("a.json", "b.safetensors", "shard-1"):
        (folder / name).symlink_to(elsewhere)
    assert settled(folder, lambda: "read") == "read"
    write(folder, "new", ["a.json", "b.safetensors"], outdated=lambda name: name.startswith("shard"))
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "b.safetensors"]
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert content(folder) == {"a.json": "new", "b.safetensors": "new"}
    assert not elsewhere.exists() if leads == "nowhere" else elsewhere.read_text() == "another's"


@pytest.mark.parametrize("leads", ["nowhere", "to a file"])
def test_single_files_take_the_place_of_links(tmp_path, leads):
    elsewhere = tmp_path / "elsewhere"
    if leads == "to a file":
        elsewhere.write_text("another's")
    for name in ("a.json", "a.json.part", "b.safetensors", "b.safetensors.part"):
        (tmp_path / name).symlink_to(elsewhere)
    write_json(tmp_path / "a.json", {"new": 1})
    write_tensors(tmp_path / "b.safetensors", {"x": torch.ones(2)}, {})
    assert read_json(tmp_path / "a.json") == {"new": 1}
    assert load_file(tmp_path / "b.safetensors")["x"].tolist() == [1, 1]
    assert sorted(path.name for path in tmp_path.iterdir() if not path.is_symlink()) == sorted(
        ["a.json", "b.safetensors", *(["elsewhere"] if leads == "to a file" else [])]
    )
    assert not elsewhere.exists() if leads == "nowhere" else elsewhere.read_text() == "another's"


def test_a_fault_of_the_reader_is_not_taken_for_a_writer(tmp_path):
    calls = []

    def read():
        calls.append(1)
        (tmp_path / "a.json").write_text("x" * len(calls))  # as a writer would
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        settled(tmp_path, read)
    assert len(calls) == 1
