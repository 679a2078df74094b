"""What pyproject.toml asks for is what continuous integration installs: every lower end has been run."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from patchattn.core.tested_releases import pinned

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# what a user installs; the tools of developers are not among it
ASKED = [Requirement(line) for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["eval"]]]
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: asked.name)
def test_every_lower_end_was_run(asked: Requirement) -> None:
    (low,) = [part.version for part in asked.specifier if part.operator == ">="]
    assert Version(pinned("oldest")[asked.name]) == Version(low)


def test_nothing_else_is_pinned() -> None:
    assert pinned("oldest").keys() == {asked.name for asked in ASKED}


@pytest.mark.parametrize("end", ["oldest", "newest"])
def test_what_was_run_is_allowed(end) -> None:
    found = pinned(end)
    assert all(asked.specifier.contains(found[asked.name]) for asked in ASKED)


def test_the_ranges_allow_what_these_tests_run_on() -> None:
    for asked in ASKED:
        installed = importlib.metadata.version(asked.name)
        assert asked.specifier.contains(installed, prereleases=True), f"{asked} does not allow {installed}"


def test_continuous_integration_installs_the_oldest() -> None:
    assert re.search(r"pip install .*--constraint patchattn/releases/oldest\.txt", CI)
    for name in ("test_behaviour", "test_seam", "test_decoding", "test_checkpoint", "test_doctor"):
        assert re.search(rf"tests/{name}\*?\.py", CI)


def test_classifiers_name_every_python() -> None:
    low = int(re.fullmatch(r">=3\.(\d+)", PROJECT["requires-python"])[1])
    named = [int(found[1]) for line in PROJECT["classifiers"] if (found := re.search(r":: 3\.(\d+)$", line))]
    assert named == list(range(low, 14))


def test_a_package_index_gets_no_link_that_it_cannot_follow() -> None:
    hook = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["metadata"]["hooks"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(r"\]\(docs/", text)
    for change in hook["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(change["pattern"], change["replacement"], text)
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links
    assert all(link.startswith("https://") for link in links)


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["title"], citation["version"]) == (PROJECT["name"], PROJECT["version"])
    assert citation["license"] == PROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
