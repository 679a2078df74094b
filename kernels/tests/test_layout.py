"""What the layout of this folder must keep."""

import ast
import sys
import tomllib
from pathlib import Path

import patchattn_kernels

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "torch-ext" / "patchattn_kernels"


def test_folder_is_not_a_package() -> None:
    assert not (ROOT / "__init__.py").exists(), "it would shadow the PyPI package `kernels` in a checkout"


def test_imports_only_torch_and_triton() -> None:
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] in allowed, f"{path.name} imports {name}"


def test_build_file_names_the_package() -> None:
    general = tomllib.loads((ROOT / "build.toml").read_text())["general"]
    assert general["name"].replace("-", "_") == PACKAGE.name


def test_card_describes_every_operation() -> None:
    card = (ROOT / "CARD.md").read_text()
    missing = [name for name in patchattn_kernels.__all__ if f"| `{name}` |" not in card]
    assert not missing
