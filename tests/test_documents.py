"""Reading JSON and YAML that a user gives: what is refused, and that messages are short and name the file."""

import json
import time

import pytest

from patchattn.files.documents import (
    as_json,
    json_lines,
    parse_json,
    parse_yaml,
    quoted,
    read_json,
    read_json_object,
    read_yaml,
    write_json,
)

# --- both kinds

BOTH = {
    "a key twice": ('{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' appears twice"),
    "an integer": ('{"a": 1%s}' % ("0" * 400), "an integer of more than 308 digits"),
    "a negative integer": ('{"a": -1%s}' % ("0" * 5000), "an integer of more than 308 digits"),
    "deep lists": ("[" * 100 + "]" * 100, "nested more than 64 deep"),
    "very deep lists": ("[" * 10**5, "nested more than 64 deep"),
    "deep mappings": ('{"a":' * 100 + "1" + "}" * 100, "nested more than 64 deep"),
}


@pytest.mark.parametrize("case", BOTH)
@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
def test_what_no_document_may_hold(parse, case):
    text, message = BOTH[case]
    with pytest.raises(ValueError, match=message) as caught:
        parse(text, "some.file")
    assert str(caught.value).startswith("some.file")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
def test_what_a_document_holds(parse):
    content = {"a": [1, 2.5, None, True, "x"], "b": {"c": {}}, "n": 10**300, "deep": [[[[1]]]]}
    assert parse(json.dumps(content), "f") == content
    assert parse("[" * 64 + "]" * 64, "f")  # as deep as is allowed


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_files_that_cannot_be_read(read, tmp_path):
    path = tmp_path / "f"
    with pytest.raises(ValueError, match="There is no "):
        read(path)
    with pytest.raises(ValueError, match="There is no ") as caught:  # the name is too long for a file
        read("x" * 10**5)
    assert len(str(caught.value)) < 400
    with pytest.raises(ValueError, match="There is no "):
        read("x\0y")
    path.write_bytes(b'{"a":\n"\xff"}')
    with pytest.raises(ValueError, match=r"/f, line 2: not UTF-8 text"):
        read(path)


# --- JSON


def test_json_says_the_line(tmp_path):
    path = tmp_path / "f.json"
    path.write_text('{\n"a": 1,\n"b": x\n}')
    with pytest.raises(ValueError, match=r"f\.json, line 3: not valid JSON: Expecting value\."):
        read_json(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"f\.json must hold a dictionary, got list"):
        read_json_object(path)


def test_json_lines_end_at_line_feeds_alone():
    text = json.dumps({"a": "x\u2028y\x85z"}, ensure_ascii=False) + '\n\n{"b": 2}\n'
    assert list(json_lines(text, "f", skip_empty=True)) == [(1, {"a": "x\u2028y\x85z"}), (3, {"b": 2})]
    assert list(json_lines("", "f")) == []
    with pytest.raises(ValueError, match="f, line 2: not valid JSON"):
        list(json_lines(text, "f"))
    with pytest.raises(ValueError, match="f, line 3: not valid JSON"):
        list(json_lines("1\n2\n{\n", "f"))
    with pytest.raises(ValueError, match="f, line 2: the key 'a' appears twice"):
        list(json_lines('1\n{"a": 1, "a": 1}\n', "f"))


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "f.json"
    write_json(path, {"a": (1, 2)})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    (tmp_path / "f.json.part").write_text("what a killed process left")
    assert read_json(path) == {"a": [1, 2]} == as_json({"a": (1, 2)})
    write_json(path, [3])
    assert [file.name for file in tmp_path.iterdir()] == ["f.json"]
    assert read_json(path) == [3]


# --- YAML

YAML = {
    "aliases": ("a: &x [1]\nb: *x\n", r"line 2: .* an alias; write the value out"),
    "recursion": ("&x [*x]", "line 1: .* an alias"),
    "a merged mapping": ("a: &x {c: 1}\nb:\n  <<: *x\n", "line 3: .* an alias"),
    "a tag": ("a: 1\nb: !!binary aGk=\n", "line 2: .* the tag .*binary"),
    "a bool tag": ("!!bool x", "the tag"),
    "an object": ("!!python/object/apply:os.system [ls]", "the tag"),
    "not YAML": ("a: 1\nb: [1, 2\nc: 3\n", "line 3: not valid YAML"),
    "tabs": ("a:\n\t- 1\n", "line 2: not valid YAML"),
    "control characters": ("a: 1\nb: \x01\n", "line 2: not valid YAML"),
    "two documents": ("a: 1\n---\nb: 1\n", "line 2: not valid YAML"),
    "a mapping as key": ("? {a: 1}\n: 2\n", "line 1: not valid YAML"),
}


@pytest.mark.parametrize("case", YAML)
def test_yaml_that_is_refused(case):
    text, message = YAML[case]
    with pytest.raises(ValueError, match=message) as caught:
        parse_yaml(text, "f.yaml")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_a_few_bytes_stand_for_a_few_bytes():
    levels = [f"&l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 9)]
    text = "a: &l0 [x, x, x, x, x, x, x, x, x]\n" + "\n".join(f"b{i}: {level}" for i, level in enumerate(levels))
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"f, line 2: .* an alias"):
        parse_yaml(text, "f")
    assert time.monotonic() - started < 30  # all of it would take hours


def test_dates_are_texts():
    assert parse_yaml("a: 2024-01-01\nb: 99999-99-99", "f") == {"a": "2024-01-01", "b": "99999-99-99"}


# --- messages


def test_a_quotation_is_short_whatever_it_quotes():
    assert quoted("x") == "'x'"
    assert quoted([1, 2.5, None]) == "[1, 2.5, None]"
    nested = "x" * 1000
    for _ in range(12):
        nested = [nested] * 100
    for value in ("x" * 10**6, [["x" * 1000] * 1000] * 10, {i: i for i in range(10**5)}, 10**5000, -(10**50), nested):
        assert len(quoted(value)) <= 203
    assert quoted(10**5000) == "an integer of 16610 bits"
