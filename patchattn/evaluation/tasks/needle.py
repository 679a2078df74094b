"""Needle in a haystack: one statement at every depth of texts of every length."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...core.settings import option
from .figures import plot_needle
from .haystack import Frame
from .retrieval import RetrievalSettings, RetrievalTask, Sample, check_list, recall
from .task import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class NeedleSettings(RetrievalSettings):
    """What is hidden, where, and how it is asked for.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range, an empty list or a value twice in one.
    """

    depths: tuple[float, ...] = option(
        (0, 25, 50, 75, 100),
        help="Share of the text that lies before the needle.",
        unit="percent",
        minimum=0,
        maximum=100,
    )
    repeats: int = option(1, help="Prompts per length and depth, each with another part of the text.", minimum=1)
    needle: str = option(
        "The spare key of the observatory lies in a blue teapot on the third shelf.", help="The sentence to be found."
    )
    question: str = option("Where does the spare key of the observatory lie?", help="What is asked about the needle.")
    answers: tuple[str, ...] = option(
        ("blue teapot", "third shelf"), help="Strings that an answer should hold; each counts the same."
    )
    max_new_tokens: int = option(32, help="Longest answer.", unit="tokens", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_list("depths", self.depths)
        check_list("answers", self.answers)
        if not all((self.needle.strip(), self.question.strip(), *map(str.strip, self.answers))):
            raise ValueError("needle, question and answers must be texts that are not empty.")
        if missing := [answer for answer in self.answers if answer.lower() not in self.needle.lower()]:
            raise ValueError(f"The needle {self.needle!r} does not hold the answer {missing[0]!r}.")


class NeedleTask(RetrievalTask):
    """One statement in a long text, at every depth and length.

    Samples come by length, depth and repeat, in this order. The needle stands at the end of a sentence, the one nearest
    to its depth. Rows say `depth` (as asked) beside `depths` (as it came out).

    Args:
        settings: fields of `NeedleSettings`.

    Raises:
        TypeError, ValueError: a wrong or unknown setting, or a text that cannot be read.
    """

    name = "needle"
    settings_class = NeedleSettings
    settings: NeedleSettings

    def __len__(self) -> int:
        return len(self.settings.lengths) * len(self.settings.depths) * self.settings.repeats

    def sample(self, index: int) -> Sample:
        """The sample of that number."""
        cell = index // self.settings.repeats
        depth = self.settings.depths[cell % len(self.settings.depths)]
        frame = Frame(
            "Read the text below. A question about one of its sentences follows it.",
            f"{self.settings.question} Answer with what the text says and nothing else.",
            "Answer:",
        )
        return Sample(
            self.settings.lengths[cell // len(self.settings.depths)],
            frame,
            [(depth, self.settings.needle)],
            self.settings.answers,
            fields={"depth": depth},
        )

    def figure(self, rows: Mapping[str, Sequence[Row]]) -> "Figure":
        """Depth by length, a heat map per run."""
        return plot_needle({name: needle_grid(answers) for name, answers in rows.items()})


@dataclass(frozen=True)
class NeedleGrid:
    """Scores by depth and length.

    Attributes:
        lengths: of the prompts, in tokens, rising.
        depths: of the needle, in percent, rising.
        scores: `[depth][length]`, recall from 0 to 100; nan where nothing was asked.
    """

    lengths: list[int]
    depths: list[float]
    scores: list[list[float]]


def needle_grid(rows: Sequence[Mapping[str, Any]]) -> NeedleGrid:
    """The mean score of every depth and length, from rows of the task `needle`.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("There are no rows of the task needle.")
    cells: dict[tuple[float, int], list[float]] = {}
    for row in rows:
        cells.setdefault((row["depth"], row["length"]), []).append(100 * recall(row))
    depths = sorted({depth for depth, _ in cells})
    lengths = sorted({length for _, length in cells})
    scores = [
        [float(np.mean(cells[depth, length])) if (depth, length) in cells else float("nan") for length in lengths]
        for depth in depths
    ]
    return NeedleGrid(lengths, depths, scores)
