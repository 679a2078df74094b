"""Docstrings as the documentation's builder reads them: each argument by the name that the signature has."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    file
    for folder in ("patchattn", "kernels/torch-ext", "recipes", "benchmarks")
    for file in ROOT.glob(f"{folder}/**/*.py")
)
Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def arguments(node: Documented) -> set[str] | None:
    """Names that a call of it takes; None for a class that inherits its maker."""
    if isinstance(node, ast.ClassDef):
        makers = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
        fields = {
            part.target.id
            for part in node.body
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
        }
        return arguments(makers[0]) if makers else fields or None
    given = node.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return {argument.arg for argument in every if argument is not None}


def entries(docstring: str, section: str) -> Iterator[str]:
    """What stands before the colon of each entry of a section."""
    found = re.search(rf"^{section}:\n((?:[ ]+.*\n|\n)*)", docstring + "\n", re.M)
    for line in found[1].splitlines() if found else ():
        if entry := re.match(r" {4}(\S[^:]*):(?: |$)", line):
            yield entry[1]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_arguments_are_described_one_by_one(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, Documented) and (docstring := ast.get_docstring(node)):
            taken = arguments(node)
            strange = [name for name in entries(docstring, "Args") if taken is not None and name not in taken]
            assert not strange, f"{node.name} describes {strange}, which are not arguments of it."
            assert not re.search(r"^Example:$", docstring, re.M), f"{node.name}: the section is called Examples."
