"""Retrieval and variable tracking as RULER (arXiv 2404.06654) defines them; the wording of the prompts is ours."""

import uuid
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...core.settings import option
from .haystack import Frame
from .retrieval import RetrievalSettings, RetrievalTask, Sample

Kind = Literal["words", "numbers", "uuids"]

_ADJECTIVES, _NOUNS = (
    words.split()
    for words in (
        "amber azure bold bright brisk broad calm clever coral crisp dusty eager early faint fresh gentle golden grand "
        "hazy hidden humble icy ivory jolly keen lively lone loyal lucky mellow misty narrow noble pale plain proud "
        "quick rapid rosy rough royal scarlet shy silent sleek smooth solemn stark steep sturdy subtle sunny swift",
        "acorn anchor badger barrel beacon birch bramble canyon cedar cliff comet copper crane delta ember falcon fern "
        "fjord flint forest garnet glacier grove hammer heron hollow island juniper kettle lagoon lantern maple marble "
        "meadow meteor onyx otter pebble pine prairie quartz raven reef ridge saddle sparrow spruce summit thicket",
    )
)


@dataclass(frozen=True, kw_only=True)
class NiahSettings(RetrievalSettings):
    """Keys with values, hidden in a text.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range, or no length or the same one twice.
    """

    samples: int = option(20, help="Prompts per length.", minimum=1)
    keys: Literal["words", "numbers", "uuids"] = option(
        "words", help="What keys are: two words, numbers of seven digits or UUIDs.", source="section 3.1"
    )
    values: Literal["words", "numbers", "uuids"] = option(
        "numbers", help="What values are: the choices of keys.", source="section 3.1"
    )


@dataclass(frozen=True, kw_only=True)
class MultikeySettings(NiahSettings):
    """One key that is asked for, and others.

    Raises:
        TypeError, ValueError: as `NiahSettings`.
    """

    needles: int = option(4, help="Keys in all, one of which is asked for.", minimum=2, maximum=1000)
    haystack: Literal["text", "needles"] = option(
        "text",
        help="What keys are hidden in. needles: the text consists of nothing but other keys with values.",
        source="section 3.1",
    )


@dataclass(frozen=True, kw_only=True)
class MultivalueSettings(NiahSettings):
    """One key with several values.

    Raises:
        TypeError, ValueError: as `NiahSettings`.
    """

    needles: int = option(4, help="Values of the key, all of which are asked for.", minimum=2, maximum=1000)


@dataclass(frozen=True, kw_only=True)
class TrackingSettings(RetrievalSettings):
    """Variables that are set to each other.

    Raises:
        TypeError, ValueError: as `RetrievalSettings`.
    """

    samples: int = option(20, help="Prompts per length.", minimum=1)
    chains: int = option(1, help="Chains of variables, one of which is asked for.", minimum=1)
    hops: int = option(4, help="Assignments that copy a variable, per chain.", minimum=1)
    max_new_tokens: int = option(64, help="Longest answer.", unit="tokens", minimum=1)


class RulerTask(RetrievalTask):
    """So many samples of each length, those of a length together; each is drawn from the seed and its number."""

    def __len__(self) -> int:
        return len(self.settings.lengths) * self.settings.samples

    def sample(self, index: int) -> Sample:
        """The sample of that number."""
        length = self.settings.lengths[index // self.settings.samples]
        return self._draw(np.random.default_rng((self.settings.seed, 2, index)), length)

    @abstractmethod
    def _draw(self, draw: np.random.Generator, length: int) -> Sample:
        """A sample of so many tokens."""


class NiahSingle(RulerTask):
    """`ruler/niah_single`: one key with one value.

    Args:
        settings: fields of `NiahSettings`.
    """

    name = "ruler/niah_single"
    settings_class = NiahSettings

    def _draw(self, draw: np.random.Generator, length: int) -> Sample:
        (key,), (value,) = _keys_and_values(draw, self.settings, 1, 1)
        return Sample(length, _frame_of_one(key), [(_depth(draw), _needle(key, value))], [value])


class NiahMultikey(RulerTask):
    """`ruler/niah_multikey`: the value of one key among others.

    Args:
        settings: fields of `MultikeySettings`.
    """

    name = "ruler/niah_multikey"
    settings_class = MultikeySettings

    def _draw(self, draw: np.random.Generator, length: int) -> Sample:
        count = self.settings.needles
        keys, values = _keys_and_values(draw, self.settings, count, count)
        needles = [(_depth(draw), _needle(key, value)) for key, value in zip(keys, values, strict=True)]
        text = None
        if self.settings.haystack == "needles":
            text = self._others(draw, length, keys[0], values[0])
        return Sample(length, _frame_of_one(keys[0]), needles, [values[0]], text)

    def _others(self, draw: np.random.Generator, length: int, key: str, value: str) -> list[str]:
        """Enough of them to fill the prompt: each has more than eight tokens."""
        kinds = (self.settings.keys, self.settings.values)
        pairs = ([_random(draw, kind) for kind in kinds] for _ in range(length // 8 + 1))
        return [f" {_needle(*pair)}" for pair in pairs if pair[0] != key and pair[1] != value]


class NiahMultivalue(RulerTask):
    """`ruler/niah_multivalue`: all values of one key.

    Args:
        settings: fields of `MultivalueSettings`.
    """

    name = "ruler/niah_multivalue"
    settings_class = MultivalueSettings

    def _draw(self, draw: np.random.Generator, length: int) -> Sample:
        (key,), values = _keys_and_values(draw, self.settings, 1, self.settings.needles)
        frame = Frame(
            "The text below mentions access codes here and there. Remember them: you will be asked for some.",
            f"Which access codes does {key} have? The text mentions {len(values)}; list all of them.",
            f"The access codes of {key} are",
        )
        return Sample(length, frame, [(_depth(draw), _needle(key, value)) for value in values], values)


class VariableTracking(RulerTask):
    """`ruler/vt`: all variables that have a value, directly or by being set to one that has it.

    The assignments of a chain stand in the text in their order.

    Args:
        settings: fields of `TrackingSettings`.
    """

    name = "ruler/vt"
    settings_class = TrackingSettings

    def _draw(self, draw: np.random.Generator, length: int) -> Sample:
        chains, size = self.settings.chains, self.settings.hops + 1
        names = _unlike(draw, chains * size, _variable)
        values = _unlike(draw, chains, _five_digits)
        statements = []
        for chain, value in enumerate(values):
            members = names[chain * size : (chain + 1) * size]
            given = [value, *(f"VAR {name}" for name in members)]
            depths = sorted(_depth(draw) for _ in members)
            statements += [
                (depth, f"VAR {name} = {source}.") for depth, name, source in zip(depths, members, given, strict=False)
            ]
        frame = Frame(
            "Variables are set in the text below, to numbers and to each other. Keep track of them.",
            f"Which variables have the value {values[0]}? There are {size}; list all of them.",
            f"The variables with the value {values[0]} are",
        )
        return Sample(length, frame, statements, names[:size])


def _frame_of_one(key: str) -> Frame:
    return Frame(
        "The text below mentions access codes here and there. Remember them: you will be asked for one.",
        f"Which access code does {key} have?",
        f"The access code of {key} is",
    )


def _needle(key: str, value: str) -> str:
    return f"One of the access codes of {key} is {value}."


def _depth(draw: np.random.Generator) -> float:
    return float(draw.uniform(0, 100))


def _random(draw: np.random.Generator, kind: Kind) -> str:
    if kind == "words":
        return f"{_ADJECTIVES[draw.integers(len(_ADJECTIVES))]}-{_NOUNS[draw.integers(len(_NOUNS))]}"
    if kind == "numbers":
        return str(draw.integers(10**6, 10**7))
    return str(uuid.UUID(bytes=draw.bytes(16), version=4))


def _variable(draw: np.random.Generator) -> str:
    return "".join(chr(ord("A") + letter) for letter in draw.integers(26, size=5))


def _five_digits(draw: np.random.Generator) -> str:
    return str(draw.integers(10**4, 10**5))


def _keys_and_values(
    draw: np.random.Generator, settings: NiahSettings, keys: int, values: int
) -> tuple[list[str], list[str]]:
    """All different: a value that is its key would stand in the question."""
    found = _unlike(draw, keys, lambda draw: _random(draw, settings.keys))
    both = _unlike(draw, keys + values, lambda draw: _random(draw, settings.values), found)
    return found, both[keys:]


def _unlike(
    draw: np.random.Generator, count: int, make: Callable[[np.random.Generator], str], known: Sequence[str] = ()
) -> list[str]:
    """So many different texts, the known ones first and then in the order in which they are drawn."""
    found = dict.fromkeys(known)
    while len(found) < count:
        found[make(draw)] = None
    return list(found)


RULER_TASKS: Sequence[type[RulerTask]] = (NiahSingle, NiahMultikey, NiahMultivalue, VariableTracking)
