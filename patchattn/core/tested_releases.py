"""The releases at hand beside those that the tests ran on, `releases/oldest.txt` and `releases/newest.txt`."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.version import Version

Verdict = Literal["tested", "newer than tested", "too old", "too new", "not installed"]
_FOLDER = Path(__file__).parents[1] / "releases"


@dataclass(frozen=True)
class Release:
    """A package that patchattn is built on.

    Attributes:
        name: of the package.
        installed: the release at hand; None without one.
        oldest: release that the tests ran on.
        newest: the other end of what they ran on.
        verdict: on the release at hand; `too old` and `too new` are outside what patchattn asks for.
    """

    name: str
    installed: str | None
    oldest: str
    newest: str
    verdict: Verdict


def pinned(name: Literal["oldest", "newest"]) -> dict[str, str]:
    """Package to release of one end of what the tests ran on."""
    lines = (_FOLDER / f"{name}.txt").read_text(encoding="utf-8").split()
    return dict(line.split("==") for line in lines)


def releases() -> list[Release]:
    """What is at hand of the packages that patchattn is built on, beside what the tests ran on."""
    newest = pinned("newest")
    return [
        Release(
            name, installed := _installed(name), oldest, newest[name], _verdict(name, installed, oldest, newest[name])
        )
        for name, oldest in pinned("oldest").items()
    ]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _verdict(name: str, installed: str | None, oldest: str, newest: str) -> Verdict:
    if installed is None:
        return "not installed"
    if Version(installed) < Version(oldest):
        return "too old"
    if not all(asked.contains(installed, prereleases=True) for asked in _asked(name)):
        return "too new"
    return "newer than tested" if Version(Version(installed).public) > Version(newest) else "tested"


def _asked(name: str) -> list[Any]:
    """What patchattn's own metadata asks of a package; nothing in a checkout that is not installed."""
    try:
        lines = requires("patchattn") or []
    except PackageNotFoundError:
        return []
    return [asked.specifier for asked in map(Requirement, lines) if asked.name == name]
