"""Settings that check themselves: what variants and recipes are configured by."""

import difflib
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

from ..files.documents import MAX_DEPTH, concerning, quoted, read_yaml

_LARGEST = 3.4028234663852886e38  # of float32


def option(
    default: Any = MISSING,
    *,
    help: str,
    source: str = "ours",
    unit: str | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[Any, ...] | None = None,
    parse: Callable[[Any], Any] | None = None,
) -> Any:
    """A documented field of `Settings`, such as those of a variant.

    Args:
        default: value used when the user gives none; without it the field must be given.
        help: what the field does.
        source: where the default comes from: the paper's section, the released code, or "ours".
        unit: unit of the value, where it has one.
        minimum: lowest value allowed of a number, or of every number of a sequence.
        maximum: highest value allowed, likewise.
        choices: the allowed values.
        parse: makes of a value that is given, other than `None`, the one that is held: the content of a file that it
            names, say. What it returns is taken as it is, so it must take that too. It raises ValueError or TypeError.
    """
    metadata = {
        "help": help,
        "source": source,
        "unit": unit,
        "minimum": minimum,
        "maximum": maximum,
        "choices": choices,
        "parse": parse,
    }
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata, kw_only=True)
    return field(default=default, metadata=metadata, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of something. Subclass it as a frozen dataclass whose fields are made by `option`.

    Values are held as JSON gives them back, but that the outermost lists are tuples: `from_dict` of what `to_dict`
    gives, be it by way of a file, is equal. A field of some other class may hold an object of it besides.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of range, a number is none that float32 or int64 holds, or (in `from_dict`) a field
            is unknown or missing.
    """

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in fields(self):
            object.__setattr__(self, item.name, _checked(item, hints[item.name], getattr(self, item.name)))

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary of JSON and YAML types; tuples become lists."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a configuration from a dictionary, such as one read from JSON or YAML."""
        if not isinstance(values, Mapping):
            raise TypeError(f"Settings are a dictionary, got {type(values).__name__}.")
        known = [item.name for item in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"There is no setting {quoted(name)}{nearest(str(name), known)}")
        required = [item.name for item in fields(cls) if item.default is item.default_factory is MISSING]
        if missing := [name for name in required if name not in values]:
            raise ValueError(f"{', '.join(missing)} must be given.")
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a configuration from a YAML file; ValueError or TypeError name the file and what is wrong with it."""
        content = read_yaml(path)
        with concerning(path):
            return cls.from_dict(content)


def nearest(name: str, known: list[str]) -> str:
    """The end of an error message about an unknown name: those that have it for a word or the closest one, and all."""
    spelled = {one.lower(): one for one in known}
    asked = name[:100].lower()
    close = [one for one in spelled if asked in one.split("_")]
    close = close or difflib.get_close_matches(asked, spelled, n=1, cutoff=0.5)
    meant = " or ".join(repr(spelled[one]) for one in close)
    return (f"; did you mean {meant}?" if close else ".") + f" Known: {', '.join(sorted(known)) or 'none'}."


def _checked(item: Field[Any], hint: Any, value: Any) -> Any:
    """The value of a field, a list turned into a tuple, or an error that says what was expected and got."""
    where = item.name
    value = _plain(value, where)
    if isinstance(value, list):
        value = tuple(value)
    parse = item.metadata.get("parse")
    if parse is not None and value is not None:
        value = parse(value)
    if not _is_instance(value, hint):
        # YAML 1.1 takes 1e-3 for text; with a point, 1.0e-3, it is a number
        hint_on_yaml = " Write numbers like 1.0e-3 with a point." if _is_number(value) else ""
        raise TypeError(
            f"{where} must be {_spell(hint)}, got {quoted(value)} of type {type(value).__name__}.{hint_on_yaml}"
        )
    limits = item.metadata
    if limits.get("choices") is not None and value not in limits["choices"]:
        raise ValueError(f"{where} must be one of {', '.join(map(repr, limits['choices']))}, got {quoted(value)}.")
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        low, high = limits.get("minimum"), limits.get("maximum")
        if number != number or (low is not None and number < low) or (high is not None and number > high):
            bounds = f"{'-inf' if low is None else low} and {'inf' if high is None else high}"
            raise ValueError(f"{where} must lie between {bounds}, got {quoted(value)}.")
    return value


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A value as JSON gives it back, every number in it finite; an object that is not a container as it is."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{where} is nested more than {MAX_DEPTH} deep.")
    if isinstance(value, bool | str | None):
        return value
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{where} must be an integer of 64 bits, got {quoted(value)}.")
        return int(value)
    if isinstance(value, float):
        if not abs(value) <= _LARGEST:
            raise ValueError(f"{where} must be a number that float32 holds, at most {_LARGEST:.1e}, got {value!r}.")
        return float(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple | range):
        return [_plain(part, where, depth + 1) for part in value]
    if isinstance(value, Mapping):
        if not all(isinstance(key, str | int) for key in value):
            raise TypeError(f"{where} must have texts or numbers as keys, got {quoted(dict(value))}.")
        return {key: _plain(part, where, depth + 1) for key, part in value.items()}
    if depth:
        raise TypeError(f"{where} holds a {type(value).__name__}, expected what JSON holds: {quoted(value)}.")
    return value


def _is_instance(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is_instance(value, part) for part in get_args(hint))
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_instance(part, get_args(hint)[0]) for part in value)
    if origin is Literal:
        return value in get_args(hint)
    if origin in (list, Sequence):
        is_several = isinstance(value, list if origin is list else list | tuple)
        return is_several and all(_is_instance(part, get_args(hint)[0]) for part in value)
    if origin in (dict, Mapping):
        of_key, of_value = get_args(hint)
        return isinstance(value, dict) and all(
            _is_instance(key, of_key) and _is_instance(part, of_value) for key, part in value.items()
        )
    if hint is Any:
        return True
    if hint is float:  # an int is a fine float; a bool is neither
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return isinstance(value, str)


def _spell(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(map(_spell, get_args(hint))))
    if hint is type(None):
        return "None"
    return hint.__name__ if type(hint) is type else re.sub(r"\b(?:[a-z]\w*\.)+", "", str(hint))
