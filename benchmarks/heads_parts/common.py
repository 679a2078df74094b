"""What the parts share: rows of results, differences of pairs, and what may be said of them."""

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from paired_rows import Row as Row
from paired_rows import append_row, read_rows
from paired_rows import paired as paired
from torch import nn

import patchattn
from patchattn.core.heads import HeadList
from patchattn.core.importance import HeadImportance

Job = tuple[str, Callable[[], Row]]  # the key of a row, and what makes the row
Place = tuple[int, int]  # (layer, head)
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

    @cached_property
    def ids(self) -> list[int]:
        """Tokens of the text."""
        found: list[int] = self.tokenizer(self.text.read_text("utf-8"), add_special_tokens=False)["input_ids"]
        return found

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


def windows(setup: Setup, length: int) -> list[list[int]]:
    """The text in pieces of so many tokens."""
    return [setup.ids[start : start + length] for start in range(0, len(setup.ids) - length + 1, length)]


def table_of(importance: HeadImportance, digits: int = 4) -> list[list[float]]:
    """Scores by layer and head, for a row."""
    sites = sorted(importance.sites.values(), key=lambda site: site.layer)
    return [[round(score, digits) for score in site.scores] for site in sites]


def best(scores: Any, count: int) -> list[Place]:
    """The (layer, head) of the highest scores of a table; equal ones by layer and head."""
    order = np.argsort(-np.asarray(scores), axis=None, kind="stable")[:count]
    width = np.shape(scores)[1]
    return [(int(place) // width, int(place) % width) for place in order]


def drawn(shape: Sequence[int], without: Collection[Place], count: int, seed: Sequence[int]) -> list[Place]:
    """So many heads of a table of this shape, none of some others."""
    outside = [place for place in np.ndindex(*shape) if place not in without]
    chosen = np.random.default_rng(seed).choice(len(outside), count, replace=False)
    return [outside[place] for place in chosen.tolist()]


@contextmanager
def silent(setup: Setup, heads: Iterable[Place]) -> Iterator[None]:
    """The outputs of these heads are zero at every token; none of them is the model as it is."""
    listed = [list(head) for head in heads]
    if not listed:
        yield
        return
    with patched(setup.model, "heads", heads=HeadList.parse(listed).to_dict()):
        yield


@torch.inference_mode()
def losses(setup: Setup, tokens: Sequence[int]) -> torch.Tensor:
    """`(T - 1,)` float64: loss of every token of a text but the first, in nats."""
    ids = torch.tensor([list(tokens)], device=setup.model.device)
    logits = setup.model(ids).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").cpu()


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
