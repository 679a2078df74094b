"""The kernel-builder project: what the package `kernels` makes of it. No build is run; that needs Nix."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "torch-ext" / "patchattn_kernels"
BUILD_ID = "_patchattn_kernels_cpu_0123abc"

# Run by a process of its own: pytest takes this folder for a package of the name `kernels`.
PROGRAM = f"""
import json, sys
from pathlib import Path
import kernels, torch, patchattn_kernels
from kernels._rust import Build
from kernels.cli import benchmark

project, folder = Path(sys.argv[1]), Path(sys.argv[2])
loaded = kernels.get_local_kernel(folder)
torch.manual_seed(0)
query, key, value = (torch.randn(2, heads, 9, 16) for heads in (4, 2, 2))
gate = (torch.rand(2, 9, 4) > 0.5).float()
outputs = [
    package.routed_attention(query, key, value, gate, package.AttentionRule(scaling=0.25, causal=True))
    for package in (patchattn_kernels, loaded)
]
classes = benchmark.discover_benchmark_classes(folder / "benchmarks" / "benchmark.py", folder)
timed = {{c.__name__: benchmark.run_benchmark_class(c, 1, 0, str(folder), True, "local")[0] for c in classes}}
print(json.dumps({{
    "backends": [str(backend) for backend in Build.open(project).general.backends],
    "is another module": loaded is not patchattn_kernels,
    "names": [package.__all__ for package in (patchattn_kernels, loaded)],
    "equal": torch.equal(*outputs),
    "operators": [hasattr(getattr(torch.ops, name), "routed_attention") for name in ("patchattn", "{BUILD_ID}")],
    "verified": {{name: [time.verified for time in times.values()] for name, times in timed.items()}},
}}))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What that process says of a folder as a build leaves it: package, metadata, a module that names operators."""
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the package kernels")
    if torch.cuda.is_available():
        pytest.skip("the folder is laid out like a build for CPUs")
    folder = tmp_path_factory.mktemp("project")
    variant = folder / "build" / "torch-cpu"
    shutil.copytree(PACKAGE, variant, ignore=shutil.ignore_patterns("__pycache__"))
    (variant / "_ops.py").write_text(f"def add_op_namespace_prefix(name):\n    return '{BUILD_ID}::' + name\n")
    metadata = {"id": BUILD_ID, "name": "patchattn-kernels", "version": 1, "license": "Apache-2.0"}
    (variant / "metadata.json").write_text(json.dumps({**metadata, "backend": {"type": "cpu"}, "python-depends": []}))
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-c", PROGRAM, str(ROOT), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_build_file_is_valid(found: Any) -> None:
    assert {"cpu", "cuda"} <= {name.lower() for name in found["backends"]}


def test_loaded_as_a_kernel_it_computes_the_same(found: Any) -> None:
    assert found["is another module"]
    assert found["names"][0] == found["names"][1]
    assert found["equal"]


def test_operators_of_a_build_have_a_namespace_of_their_own(found: Any) -> None:
    """Otherwise two versions in one process would replace each other's operators."""
    assert found["operators"] == [True, True]


def test_benchmark_of_the_kernels_package(found: Any) -> None:
    assert set(found["verified"]) == {"RoutedAttention", "BlockSparseAttention"}
    assert all(passed and all(passed) for passed in found["verified"].values())


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_no_operator_is_registered_by_a_name_of_its_own(path: Path) -> None:
    assert not re.search(r"(?:custom_op|triton_op|register_\w+)\(\s*[\"']\w+::", path.read_text(encoding="utf-8"))


def test_card_has_the_version_and_the_benchmark() -> None:
    card = (ROOT / "CARD.md").read_text(encoding="utf-8")
    assert "version={{version}}" in card
    assert "{% if has_benchmark %}" in card
