"""What settings hold: what `parse` makes of a value, of the type that the field says, and nothing of any type."""

import ast
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

import patchattn
from patchattn import Settings, option
from patchattn.core.importance import HeadImportance

from .families import FAMILIES

ROOT = Path(patchattn.__file__).parent


def doubled(given):
    if given == 13:
        raise ValueError("13 is refused")
    return tuple(2 * part if part < 10 else part for part in given) if isinstance(given, tuple) else given


@dataclass(frozen=True, kw_only=True)
class Parsed(Settings):
    numbers: tuple[int, ...] | None = option((1, 2), help="Some numbers.", parse=doubled, maximum=100)
    words: Mapping[str, Sequence[int]] = option({}, help="Some words.")
    nested: dict[str, list[float]] | str = option({}, help="Some lists.")


def test_what_parse_makes_of_a_value_is_held() -> None:
    assert Parsed().numbers == (2, 4)  # of the default as well
    assert Parsed(numbers=[3, 50]).numbers == (6, 50)
    assert Parsed(numbers=None).numbers is None
    with pytest.raises(ValueError, match="13 is refused"):
        Parsed(numbers=13)
    with pytest.raises(TypeError, match=r"numbers must be tuple\[int, ...\] \| None, got 'x'"):
        Parsed(numbers="x")
    with pytest.raises(ValueError, match=r"between -inf and 100"):
        Parsed(numbers=[101])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"words": {"a": [1, "b"]}}, r"words must be Mapping\[str, Sequence\[int\]\], got"),
        ({"words": {"a": "12"}}, "words must be"),
        ({"words": {3: [1]}}, "words must be"),
        ({"words": [["a", 1]]}, "words must be"),
        ({"nested": {"a": [True]}}, r"nested must be dict\[str, list\[float\]\] \| str, got"),
        ({"nested": {"a": 1.0}}, "nested must be"),
    ],
)
def test_types_are_checked_to_the_bottom(wrong, message) -> None:
    assert Parsed(words={"a": (1, 2)}, nested={"a": [1, 2.5]}).to_dict()["words"] == {"a": [1, 2]}
    with pytest.raises(TypeError, match=message):
        Parsed(**wrong)


def parts_of(hint) -> set:
    return {hint}.union(*(parts_of(part) for part in typing.get_args(hint)))


@pytest.mark.parametrize("name", patchattn.list_variants())
def test_no_setting_of_a_variant_is_of_any_type(name: str) -> None:
    config = patchattn.variant_info(name).variant.config_class
    hints = typing.get_type_hints(config)
    for item in fields(config):
        assert typing.Any not in parts_of(hints[item.name]), item.name


def test_nothing_but_the_machinery_of_settings_sets_what_is_frozen() -> None:
    files = [*ROOT.rglob("*.py"), *(ROOT.parent / "recipes").glob("*.py")]
    assert len(files) > 150
    found = [
        str(path.relative_to(ROOT.parent))
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "__setattr__" and ast.unparse(node.value) == "object"
    ]
    assert found == ["patchattn/core/settings.py"]


def test_what_a_config_of_heads_takes_comes_back_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "heads.json"
    file.write_text('{"heads": {"1": [2, 0]}}')
    given = (str(file), file, {1: [2, 0]}, {"1": (0, 2)}, [[1, 0], [1, 2]], {"heads": {"1": [0, 2]}})
    for variant, more in (("act", {}), ("prune", {}), ("flap", {"compensate": False})):
        info = patchattn.variant_info(variant)
        held = [info.configure({"heads": each, **more}) for each in given]
        assert all(config.heads == {"heads": {"1": [0, 2]}} for config in held)
        assert all(info.variant.config_class.from_dict(config.to_dict()) == config for config in held)


def test_scores_of_heads_are_held_as_the_object_they_are() -> None:
    model = FAMILIES["llama"].make()
    scores = patchattn.head_importance(model, [], method="magnitude")
    assert isinstance(scores, HeadImportance)
    config = patchattn.variant_info("prune").configure({"sparsity": 0.3, "importance": scores})
    assert config.importance is scores
    with pytest.raises(TypeError, match=r"importance must be str \| Path \| HeadImportance \| None"):
        patchattn.patch_model(model, "prune", sparsity=0.3, importance=object())
