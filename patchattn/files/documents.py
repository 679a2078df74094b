"""JSON and YAML from a user: read with bounds, and every mistake named with its file; and JSON written whole.

What is read holds dictionaries with each key once, lists, texts, numbers, booleans and null, nested at most `MAX_DEPTH`
deep. YAML's aliases and tags are refused: a few hundred bytes of aliases stand for gigabytes.
"""

import json
import os
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from .writing import write_text

MAX_DEPTH = 64
_MAX_QUOTE = 200  # characters of a value in a message
_MAX_FLOAT_DIGITS = 308  # of an integer that a float holds for certain


def read_text(path: str | os.PathLike[str], *, encoding: str = "utf-8") -> str:
    """The text of a file.

    Raises:
        ValueError: the file is missing, cannot be read, or is not UTF-8; the message names it.
    """
    if not os.path.isfile(path):  # Path.is_file raises OSError on a name that is too long
        raise ValueError(f"There is no file {quoted(os.fspath(path))}.")
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    return decoded(content, path, encoding=encoding)


def decoded(content: bytes, path: str | os.PathLike[str], *, encoding: str = "utf-8") -> str:
    """The text that the bytes of a file hold; ValueError, with the line, if they are not UTF-8."""
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{os.fspath(path)}, line {line}: not UTF-8 text.") from error


def parse_json(text: str, where: str | os.PathLike[str], *, line: int = 1) -> Any:
    """What a JSON text holds.

    Args:
        text: the text.
        where: the file, for messages.
        line: at which the text begins there.

    Raises:
        ValueError: not valid JSON, a key twice, an integer beyond every float, or nested too deep.
    """
    try:
        content = _DECODER.decode(text.removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{os.fspath(where)}, line {line + error.lineno - 1}: not valid JSON: {error.msg}.") from error
    except RecursionError as error:
        raise ValueError(f"{os.fspath(where)}: nested more than {MAX_DEPTH} deep.") from error
    except ValueError as error:
        raise ValueError(f"{os.fspath(where)}{f', line {line}' if line > 1 else ''}: {error}") from error
    level = [content] if isinstance(content, dict | list) else []
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
    if level:
        raise ValueError(f"{os.fspath(where)}: nested more than {MAX_DEPTH} deep.")
    return content


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds; ValueError, naming the file, as `read_text` and `parse_json`."""
    return parse_json(read_text(path), path)


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON file that holds a dictionary; ValueError as `read_json`, and if it holds something else."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{os.fspath(path)} must hold a dictionary, got {type(content).__name__}.")
    return content


def json_lines(text: str, where: str | os.PathLike[str], *, skip_empty: bool = False) -> Iterator[tuple[int, Any]]:
    """Number and value of every line of a text with a JSON value on each.

    Texts may hold what `splitlines` takes for an end of line, so that lines end at line feeds alone.

    Args:
        text: the text.
        where: the file, for messages.
        skip_empty: leave empty lines out; they are refused otherwise.

    Raises:
        ValueError: as `parse_json`, with the line.
    """
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), 1):
        if line.strip() or not skip_empty:
            yield number, parse_json(line, where, line=number)


def parse_yaml(text: str, where: str | os.PathLike[str], *, has_lines: bool = True) -> Any:
    """What a YAML text holds.

    Args:
        text: the text.
        where: the file or option, for messages.
        has_lines: whether messages say the line.

    Raises:
        ValueError: not valid YAML, an alias, a tag, a key twice, an integer beyond every float, or nested too deep.
    """
    try:
        return _load_yaml(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, problem = (mark.line + 1 if mark else 1), error.problem or error.context
    except yaml.reader.ReaderError as error:
        line, problem = text.count("\n", 0, error.position) + 1, f"{error.reason} ({error.character:#x})"
    raise ValueError(f"{os.fspath(where)}{f', line {line}' if has_lines else ''}: not valid YAML: {problem}.")


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        ValueError: no such file, or as `read_text` and `parse_yaml`.
        TypeError: it holds something else.
    """
    if not os.path.isfile(path):
        raise ValueError(f"There is no configuration {quoted(os.fspath(path))}.")
    content = parse_yaml(read_text(path), path)
    if not isinstance(content, dict):
        raise TypeError(f"{os.fspath(path)} must hold a mapping, got {type(content).__name__}.")
    return content


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write a JSON file whole or not at all, as `writing.taking_place` says."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def as_json(content: Any) -> Any:
    """What is read again where this is written as JSON: tuples become lists, and keys texts."""
    return json.loads(json.dumps(content))


def quoted(value: Any) -> str:
    """A value for a message, as `repr` gives it, but short whatever it is."""
    text = _QUOTE.repr(value)
    return text if len(text) <= _MAX_QUOTE else f"{text[:_MAX_QUOTE]}..."


def naming(path: str | os.PathLike[str], error: Exception) -> Exception:
    """A user's mistake again, with the file that holds it named first; to be raised from the error."""
    kind = next((k for k in (NotImplementedError, TypeError) if isinstance(error, k)), ValueError)
    name = os.fspath(path)
    return kind(str(error) if name in str(error) else f"{name}: {error}")


@contextmanager
def concerning(path: Any) -> Iterator[None]:
    """Name this file first in whatever user's mistake the `with` block raises; do nothing for what is not a path."""
    try:
        yield
    except (NotImplementedError, TypeError, ValueError) as error:
        if not isinstance(path, str | os.PathLike):
            raise
        raise naming(path, error) from error


@contextmanager
def laid_out(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name the file where the `with` block finds that its content is not laid out as expected.

    Raises:
        ValueError: instead of what Python raises for an entry that is missing or of another type.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{os.fspath(path)} is damaged: its content is not laid out as expected ({reason})."
        ) from error


class _Quote(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple = 3, 8, 12, 12
        self.maxstring = self.maxother = _MAX_QUOTE

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        """In its own order, where reprlib sorts: what names a thing is written before its details."""
        if not x or level <= 0:
            return super().repr_dict(x, level)
        pairs = [f"{self.repr1(key, level - 1)}: {self.repr1(x[key], level - 1)}" for key in islice(x, self.maxdict)]
        return f"{{{', '.join([*pairs, *([self.fillvalue] if len(x) > self.maxdict else [])])}}}"

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write integers of more than 4300 digits
        return f"an integer of {x.bit_length()} bits" if x.bit_length() > 128 else repr(x)


_QUOTE = _Quote()


def _bounded(number: int) -> int:
    if abs(number) >= 10**_MAX_FLOAT_DIGITS:
        raise ValueError(f"an integer of more than {_MAX_FLOAT_DIGITS} digits.")
    return number


def _integer(text: str) -> int:
    if len(text) > _MAX_FLOAT_DIGITS + 1:
        raise ValueError(f"an integer of more than {_MAX_FLOAT_DIGITS} digits.")
    return _bounded(int(text))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"the key {quoted(twice)} appears twice.")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without aliases, tags and dates, which reads every key once."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) not in (None, "!"):
            what = "an alias" if isinstance(event, yaml.AliasEvent) else f"the tag {quoted(event.tag)}"
            raise _problem(f"{what}; write the value out", event.start_mark)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _problem(f"nested more than {MAX_DEPTH} deep", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in keys:
                    raise _problem(f"the key {quoted(key.value)} appears twice", key.start_mark)
                keys.add((key.tag, key.value))
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found

    def construct_integer(self, node: Any) -> int:
        try:
            return _bounded(self.construct_yaml_int(node))
        except ValueError as error:
            raise _problem(f"an integer of more than {_MAX_FLOAT_DIGITS} digits", node.start_mark) from error


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


def _problem(text: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=mark)


def _load_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)
