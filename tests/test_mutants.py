"""Every variant's own tests notice when what it changes is multiplied. A new variant is in by being registered."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import patchattn

from .mutation import own_tests, stages

NAMES = patchattn.list_variants()
MUTANTS = [(name, stage) for name in NAMES for stage in stages(patchattn.variant_info(name).variant)]


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_changes_something_and_has_tests_of_its_own(name: str) -> None:
    assert stages(patchattn.variant_info(name).variant), "mutation.STAGES knows no method by which it changes a model"
    assert own_tests(name), f"there is no tests/test_{name}.py"


def run(name: str, tests: list[str]) -> subprocess.CompletedProcess[str]:
    """Tests of a variant in a process of their own, without the settings of this run."""
    settings = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--mutate", name, *tests]
    return subprocess.run(command, cwd=Path(__file__).parents[1], env=settings, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), MUTANTS, ids=[".".join(mutant) for mutant in MUTANTS])
def test_a_mutant_is_noticed_by_the_variants_own_tests(name: str, stage: str) -> None:
    found = run(f"{name}.{stage}", own_tests(name))
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    assert "the mutant was noticed by" in found.stdout


@pytest.mark.slow
def test_a_mutant_that_nobody_tests_survives() -> None:
    found = run("act.attend", own_tests("logn"))
    assert found.returncode == 1
    assert "passed" in found.stdout
