"""The complete variant that CONTRIBUTING shows: one short file, and by being registered it has the whole coverage."""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
(CODE,) = re.findall(
    r"^```python\n([^`]*?register_variant\(.*?)^```$",
    (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
    re.M | re.S,
)
# The file where CONTRIBUTING says that it goes, in the package for the length of a run.
PLUGIN = """
import importlib
from pathlib import Path

def pytest_configure(config):
    import patchattn.variants.gating
    patchattn.variants.gating.__path__.append(str(Path(__file__).parent / "gating"))
    importlib.import_module("patchattn.variants.gating.head_scale")
"""


def run_with_the_example(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, set[str]]]:
    """Tests in a process that knows the example; and by variant, the names of those that passed."""
    (folder / "gating").mkdir()
    (folder / "gating" / "head_scale.py").write_text(CODE, encoding="utf-8")
    (folder / "with_head_scale.py").write_text(PLUGIN, encoding="utf-8")
    settings = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    settings["PYTHONPATH"] = os.pathsep.join([str(folder), settings.get("PYTHONPATH", "")])
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "with_head_scale"]
    done = subprocess.run(
        [*command, f"--junitxml={report}", *arguments], cwd=ROOT, env=settings, capture_output=True, text=True
    )
    passed = defaultdict(set)
    for test in ElementTree.parse(report).iter("testcase"):
        name, _, parameters = test.attrib["name"].partition("[")
        if not len(test):
            passed["head_scale" if "head_scale" in parameters else "logn"].add(name)
    return done, passed


def test_it_is_short() -> None:
    assert len(CODE.splitlines()) <= 60


def test_registered_it_is_in_the_behaviour_suite(tmp_path: Path) -> None:
    """It gets the tests that a shipped variant gets, here on one family, and passes them."""
    which = "(head_scale or logn) and llama and not test_behaviour_compiled"
    tests = [str(path) for path in sorted(Path(__file__).parent.glob("test_behaviour*.py"))]
    done, passed = run_with_the_example(tmp_path, *tests, str(Path(__file__).with_name("test_neutral.py")), "-k", which)
    assert done.returncode == 0, done.stdout[-3000:]
    assert passed["head_scale"] == passed["logn"]
    assert len(passed["logn"]) > 15
