"""Help texts of options stand alone: each is printed by itself, without the ones before it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import patchattn

ROOT = Path(__file__).parent.parent
# How a text begins that leans on another one, or on the name of its option.
LEANING = re.compile(r"(Of|As|Such|Same|The same|See|Likewise|Its|Their|Also|Ditto|Put|That|This|It|And|Or|But)\b")


def helps() -> Iterator[tuple[str, str]]:
    """Where, and what is said of an option: whatever is called with a literal `help`."""
    for folder in ("patchattn", "recipes", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                for keyword in node.keywords if isinstance(node, ast.Call) else ():
                    if keyword.arg == "help" and isinstance(keyword.value, ast.Constant | ast.JoinedStr):
                        parts = keyword.value.values if isinstance(keyword.value, ast.JoinedStr) else [keyword.value]
                        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
                        yield f"{path.relative_to(ROOT)}:{keyword.value.lineno}", text


def test_every_help_stands_alone() -> None:
    found = dict(helps())
    assert len(found) > 250
    wrong = {place: text for place, text in found.items() if LEANING.match(text)}
    assert not wrong
    unfinished = {
        place: text for place, text in found.items() if not re.match(r"[A-Z0-9'{]", text) or text[-1] not in ".:"
    }
    assert not unfinished


def test_every_setting_of_a_variant_is_described_in_words_of_its_own() -> None:
    for name in patchattn.list_variants():
        texts = [field["help"] for field in patchattn.variant_info(name).config_fields.values()]
        assert len(set(texts)) == len(texts)
        assert all(len(text.split()) >= 3 for text in texts), name
