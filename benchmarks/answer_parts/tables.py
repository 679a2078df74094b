"""Tables, and what may be said of claims, from rows of results."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from scipy import stats

from patchattn.evaluation.report.report import markdown_table

from .cases import NEEDLES
from .rows import Outcomes, differences

RIGHT, NATS, SHARE, PARTS = range(4)  # places of numbers in outcomes
FEWEST = 4  # pairs of which anything is said
NEAR = 0.1  # nats a token that are called little

Rows = Mapping[str, Outcomes]


class Setting(NamedTuple):
    """A method, what it was asked for, and when a cache is compressed, if one is."""

    method: str
    asked: str
    when: str = ""

    @property
    def name(self) -> str:
        return " ".join(filter(None, self))


def of(rows: Rows, tasks: Iterable[str], length: int | None = None) -> Rows:
    """Rows of prompts of these tasks, and of this length."""
    asked = set(tasks)
    parts = {key: key.split("/") for key in rows}
    return {
        key: found
        for key, found in rows.items()
        if parts[key][0] in asked and (length is None or int(parts[key][1]) == length)
    }


def lengths(rows: Rows, tasks: Iterable[str]) -> list[int]:
    return sorted({int(key.split("/")[1]) for key in of(rows, tasks)})


def settings(rows: Rows, methods: Sequence[str], when: str = "") -> list[Setting]:
    """Those that are in rows, by method and from the largest setting to the smallest.

    Where a method's rule does not depend on when a cache is compressed, it was asked once.
    """
    found = {name for outcomes in rows.values() for name in outcomes}
    result = []
    for method in methods:
        own = {name[len(method) + 1 :].split(" ")[0]: name for name in sorted(found) if name.startswith(f"{method} ")}
        for asked in sorted(own, key=float, reverse=True):
            choices = [Setting(method, asked, when), Setting(method, asked, "with" if when else "")]
            result += [choice for choice in choices if choice.name in found][:1]
    return result


def so_far(rows: Rows) -> str:
    """How much of the work is done."""
    return f"Prompts so far: {len(rows)}; `run` goes on with further ones, other shares of the keys and longer texts."


def mean(rows: Rows, name: str, place: int) -> float:
    values = [found[name][place] for found in rows.values() if name in found]
    return sum(values) / len(values) if values else math.nan


def number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def apart(rows: Rows, name: str, other: str | None, place: int = NATS, digits: int = 2) -> str:
    """Mean difference of pairs and its standard error."""
    if other is None or name == other:
        return ""
    count, _, difference, error = differences(rows, name, other, place)
    if not count:
        return ""
    return f"{difference:+.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def needles_table(rows: Rows, asked: Sequence[Setting], share: str, baselines: Mapping[str, str]) -> list[str]:
    """Of every setting: right answers of each task, nats, differences to dense and to a baseline.

    Args:
        rows: of needles.
        asked: the settings.
        share: what the column of shares is called.
        baselines: for each name of a setting that of its baseline.
    """
    tasks = [task for task in NEEDLES if of(rows, [task])]
    head = ["method", "asked", share, *(f"{task}, %" for task in tasks[:2]), "nats", "minus dense"]
    head += ["minus baseline", "prompts"]
    lines = []
    for setting in (Setting("dense", ""), *asked):
        name = setting.name
        count = sum(name in found for found in rows.values())
        if not count:
            continue
        right = [number(100 * mean(of(rows, [task]), name, RIGHT), 0) for task in tasks[:2]]
        both = [apart(rows, name, other) for other in ("dense", baselines.get(name))]
        shares = number(100 * mean(rows, name, SHARE), 0)
        lines.append(
            [setting.method, setting.asked, shares, *right, number(mean(rows, name, NATS), 2), *both, str(count)]
        )
    return markdown_table(head, lines, texts=1)


def losses_table(rows: Rows, asked: Sequence[Setting], share: str, baselines: Mapping[str, str]) -> list[str]:
    """Of every setting: nats a token, their differences to dense and to a baseline."""
    lines = []
    for setting in (Setting("dense", ""), *asked):
        name = setting.name
        count = sum(name in found for found in rows.values())
        if count:
            numbers = [number(100 * mean(rows, name, SHARE), 0), number(mean(rows, name, NATS), 3)]
            both = [apart(rows, name, other, digits=3) for other in ("dense", baselines.get(name))]
            lines.append([setting.method, setting.asked, *numbers, *both, str(count)])
    return markdown_table(["method", "asked", share, "nats", "minus dense", "minus baseline", "texts"], lines, texts=1)


def positions_table(rows: Rows, asked: Sequence[Setting], share: str) -> list[str]:
    """Of every setting: differences to the dense nats in each part of a text."""
    count = max((len(found["dense"]) - PARTS for found in rows.values() if "dense" in found), default=0)
    lines = []
    for setting in (Setting("dense", ""), *asked):
        name = setting.name
        texts = sum(name in found for found in rows.values())
        if not texts:
            continue
        cells = [
            number(mean(rows, name, PARTS + part), 3)
            if name == "dense"
            else apart(rows, name, "dense", PARTS + part, 3)
            for part in range(count)
        ]
        lines.append([setting.method, setting.asked, number(100 * mean(rows, name, SHARE), 0), *cells, str(texts)])
    return markdown_table(["method", "asked", share, *(f"part {n + 1}" for n in range(count)), "texts"], lines, texts=1)


def better(rows: Rows, name: str, other: str, place: int = NATS, *, wants: int = -1) -> str:
    """Whether a difference is what is claimed, outside of the 95 % interval around zero, and its size.

    Args:
        rows: of prompts.
        name: the one.
        other: what it is compared with.
        place: of the number.
        wants: -1 if its nats should be fewer.
    """
    return _said(rows, name, other, place, lambda difference, error: wants * difference > error, wants)


def near(rows: Rows, name: str, other: str = "dense", place: int = NATS) -> str:
    """Whether what is lost is little, its 95 % interval below `NEAR`, and its size."""
    return _said(rows, name, other, place, lambda difference, error: difference + error < NEAR, -1, NEAR)


def _said(
    rows: Rows,
    name: str,
    other: str,
    place: int,
    is_shown: Callable[[float, float], bool],
    wants: int,
    bar: float = 0.0,
) -> str:
    count, _, difference, error = differences(rows, name, other, place)
    if count < 2 or math.isnan(error):
        return f"not measured ({count})"
    around = float(stats.t.ppf(0.975, count - 1)) * error
    if count < FEWEST:
        return f"too few prompts: {difference:+.2f} ± {error:.2f} ({count})"
    opposite = -wants * (difference - bar) > around
    said = "**shown**" if is_shown(difference, around) else "no, the opposite" if opposite else "not shown"
    return f"{said} {difference:+.2f} ± {error:.2f} ({count})"


def claims_table(
    claims: Mapping[str, str], asked: Mapping[str, str], columns: Mapping[str, Callable[[str], str]]
) -> list[str]:
    """Of every method what its paper says of its choice, and what is shown of it.

    Args:
        claims: of methods.
        asked: the name of the setting of each that is looked at.
        columns: title to what is said of a method.
    """
    lines = [
        [f"`{asked[method]}`", claim, *(column(method) for column in columns.values())]
        for method, claim in claims.items()
    ]
    head = ["method", "claim", *columns]
    return markdown_table(head, lines, texts=len(head))


HOW_CLAIMS_ARE_JUDGED = (
    "Nats a token, differences of pairs with their standard errors and the number of prompts. A difference is called "
    "shown if its 95 % interval, by Student's t, does not hold zero; that little is lost, if the interval is below "
    f"{NEAR} nats a token; of fewer than {FEWEST} prompts neither is said. The papers' models are larger and their "
    "texts longer."
)
