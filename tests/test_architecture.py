"""Folders depend on each other one way, and files never in a circle: as CONTRIBUTING and docs/concepts.md say."""

import ast
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Lowest first. What stands in one row does not know each other.
ORDER = (
    ("patchattn_kernels", "files", "version"),
    ("cache",),
    ("core",),
    ("hosts",),
    ("positions", "softmax", "surgery", "vision", "saving"),
    ("reading",),
    ("decoding", "checking"),
    ("inspection", "exporting"),
    ("variants",),
    ("training", "plotting"),
    ("bench",),
    ("evaluation",),
    ("calibration", "demo"),
    ("cli",),
)
# These stand on core and hosts alone, but that coverage asks surgery which heads can be taken out.
STANDS_ON = {
    "saving": {"patchattn_kernels", "files", "version", "cache", "core", "hosts"},
    "checking": {"patchattn_kernels", "files", "version", "cache", "core", "hosts", "surgery", "saving"},
}
RANK = {folder: rank for rank, folders in enumerate(ORDER) for folder in folders}
SOURCES = {
    ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): (
        path.read_text(encoding="utf-8"),
        path.name == "__init__.py",
    )
    for root in (ROOT, ROOT / "kernels" / "torch-ext")
    for package in ("patchattn", "patchattn_kernels")
    for path in (root / package).rglob("*.py")
}
Sources = Mapping[str, tuple[str, bool]]


def imports(sources: Sources) -> dict[str, set[str]]:
    """Every module to those that it imports, at whatever place: in functions, for types alone, by `import_module`."""
    return {name: set(_imported(name, sources)) - {name} for name in sources}


def _imported(name: str, sources: Sources) -> Iterator[str]:
    text, is_package = sources[name]
    package = name if is_package else name.rpartition(".")[0]
    for node in _import_nodes(text):
        if isinstance(node, ast.Import):
            yield from (module for alias in node.names for module in _known(alias.name, sources))
        elif isinstance(node, ast.ImportFrom):
            base = _absolute("." * node.level + (node.module or ""), package)
            for alias in node.names:
                yield from _known(f"{base}.{alias.name}", sources) or _known(base, sources)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__") and node.args:
            given = node.args[0]
            if isinstance(given, ast.Constant) and isinstance(given.value, str):
                yield from _known(_absolute(given.value, package), sources)


@functools.cache
def _import_nodes(text: str) -> list[ast.AST]:
    kinds = (ast.Import, ast.ImportFrom, ast.Call)
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]


def _absolute(name: str, package: str) -> str:
    level = len(name) - len(name.lstrip("."))
    if not level:
        return name
    parts = package.split(".")
    return ".".join([*parts[: len(parts) - level + 1], *filter(None, [name.lstrip(".")])])


def _known(name: str, sources: Sources) -> list[str]:
    return [name] if name in sources else []


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def folder(module: str) -> str:
    """`""` for what lies beside the folders, which may use them all."""
    package, *parts = module.split(".")
    if package == "patchattn_kernels":
        return package
    return parts[0] if parts and parts[0] != "__main__" else ""


def arrows_back(arrows: Mapping[str, set[str]]) -> list[str]:
    """Imports of a folder that stands higher, or beside."""
    found = []
    for module, others in sorted(arrows.items()):
        own = folder(module)
        for other in sorted(others):
            theirs = folder(other)
            if own == theirs or not own:
                continue
            allowed = theirs in RANK and RANK[theirs] < RANK[own] and theirs in STANDS_ON.get(own, RANK)
            if not allowed:
                found.append(f"{module} -> {other}")
    return found


def circle(arrows: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; empty where there is none."""
    done: set[str] = set()

    def follow(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(arrows[module]):
            if found := follow(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(arrows) if (found := follow(module, []))), [])


def test_every_folder_has_its_place() -> None:
    assert {folder(module) for module in SOURCES} - {""} <= set(RANK)


def test_no_arrow_runs_back() -> None:
    assert arrows_back(imports(SOURCES)) == []


def test_no_circle_between_files() -> None:
    assert circle(imports(SOURCES)) == []


def test_no_mechanism_imports_a_paper() -> None:
    """Among the variants too, a paper imports none but itself: what two need is below them."""
    for module, others in imports(SOURCES).items():
        if folder(module) == "variants":
            papers = {".".join(other.split(".")[:4]) for other in others if folder(other) == "variants"}
            assert papers <= {".".join(module.split(".")[:4])}, module


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("core.call", "from ..variants.routing import moh"),
        ("core.call", "def f():\n    from ..hosts.transformers.seam import connect"),
        ("core.call", "if TYPE_CHECKING:\n    from ..surgery.change import Change"),
        ("core.call", "importlib.import_module('patchattn.variants.sinks.act')"),
        ("core.call", "import_module('..variants.sinks.act', __package__)"),
        ("core.call", "import patchattn.saving.hub"),
        ("core.call", "from .. import find_sites"),
        ("saving.hub", "from ..surgery import change"),
        ("plotting.style", "from ..training import groups"),
    ],
)
def test_an_arrow_back_is_seen(module: str, line: str) -> None:
    text, is_package = SOURCES[f"patchattn.{module}"]
    changed = {**SOURCES, f"patchattn.{module}": (f"{text}\n{line}\n", is_package)}
    (found,) = arrows_back(imports(changed))
    assert found.startswith(f"patchattn.{module} -> patchattn")


def test_a_circle_is_seen() -> None:
    text, is_package = SOURCES["patchattn.core.run"]
    changed = {**SOURCES, "patchattn.core.run": (f"{text}\nfrom .call import AttentionCall\n", is_package)}
    assert "patchattn.core.run" in circle(imports(changed))
