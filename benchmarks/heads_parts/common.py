"""What the parts share: rows of results, differences of pairs, and what may be said of them."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from paired_rows import Row as Row
from paired_rows import append_row, read_rows
from paired_rows import paired as paired
from torch import nn

import patchattn
from patchattn.core.heads import HeadList

Job = tuple[str, Callable[[], Row]]  # the key of a row, and what makes the row
MASKED = (5, 10, 20)  # how many heads are masked


@dataclass
class Setup:
    """What every part is given.

    Attributes:
        model: a causal language model in evaluation mode.
        tokenizer: of it.
        text: file of plain text, for perplexity and for needles to be hidden in.
        folder: for rows.
        samples: prompts of each length.
        lengths: of prompts with a needle, in tokens.
        encoder: folder of an encoder that is to be fine-tuned; without it and `sentences`, no rollout.
        sentences: folder with SST-2's train.tsv and dev.tsv.
        speech: folder of a Whisper; without it no cross attention.
    """

    model: Any
    tokenizer: Any
    text: Path
    folder: Path
    samples: int
    lengths: tuple[int, ...] = (1024, 2048)
    encoder: Path | None = None
    sentences: Path | None = None
    speech: Path | None = None

    def rows(self, part: str) -> dict[str, Row]:
        """The rows of a part that are there, by key."""
        return read_rows(self.folder / f"{part}.jsonl")

    def write(self, part: str, key: str, row: Row) -> None:
        """Append a row."""
        append_row(self.folder / f"{part}.jsonl", key, row)


class Part(Protocol):
    """A module of this folder: to add a part, write one and name it in `PARTS` of heads.py.

    Attributes:
        NAME: of its file of rows.
        STAGE: parts of a lower stage are done before those of a higher one begin; those of one stage take turns.
    """

    NAME: str
    STAGE: int

    def jobs(self, setup: Setup) -> list[Job]:
        """All of them, in the order in which they are done."""
        ...

    def section(self, setup: Setup, pictures: Path | None) -> list[str]:
        """Lines of the page, from the rows that are there; pictures go into the folder."""
        ...


@contextmanager
def patched(model: nn.Module, variant: str, **settings: Any) -> Iterator[None]:
    patchattn.patch_model(model, variant, settings)
    try:
        yield
    finally:
        patchattn.unpatch_model(model)


def ranking(setup: Setup) -> list[tuple[int, int]]:
    """(layer, head), the one that retrieves most first; equal ones by layer and head. Fixed when first asked for."""
    path = setup.folder / "heads.json"
    if not path.exists():
        scores = mean_scores(setup)
        order = sorted((-float(scores[layer, head]), layer, head) for layer, head in np.ndindex(*scores.shape))
        path.write_text(json.dumps([[layer, head] for _, layer, head in order]) + "\n", encoding="utf-8")
    return [(layer, head) for layer, head in json.loads(path.read_text("utf-8"))]


def mean_scores(setup: Setup) -> np.ndarray:
    """`(layers, heads)` mean retrieval scores over the texts that count."""
    counted = [row["scores"] for row in setup.rows("retrieval").values() if row["scores"] is not None]
    if not counted:
        raise ValueError("No text counts yet: the model must answer one before heads can be ranked.")
    return np.mean(np.array(counted), axis=0)


def top_and_random(setup: Setup, seed: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Lists of heads by name: the best ones, and as many drawn from outside the longest list."""
    order = ranking(setup)
    outside, draw = order[max(MASKED) :], np.random.default_rng(seed)
    found = {}
    for count in MASKED:
        found[f"top {count}"] = order[:count]
        places = draw.choice(len(outside), count, replace=False)
        found[f"random {count}"] = [outside[place] for place in places]
    return {name: HeadList.parse([list(head) for head in heads]).to_dict() for name, heads in found.items()}


def verdict(claim: str, difference: float, error: float, unit: str, *, wants: int) -> str:
    """A line that says whether a difference is what is claimed: more than two standard errors from zero.

    Args:
        claim: what is claimed.
        difference: mean over pairs.
        error: its standard error.
        unit: of both.
        wants: 1 if it should be above zero, -1 if below.
    """
    size = f"{difference:+.2f} {unit}, standard error {error:.2f}"
    if math.isnan(error):
        return f"- {claim}: **not measured**, too few pairs."
    if difference == 0 and error == 0:
        return f"- {claim}: **not shown**, every pair came out alike."
    if wants * difference > 2 * error:
        return f"- {claim}: **shown** ({size})."
    if wants * difference < -2 * error:
        return f"- {claim}: **not shown, the opposite is** ({size})."
    return f"- {claim}: **not shown** ({size})."
