"""Prompts of many documents: one holds the answer, or two together; generated, and natural ones of LongBench."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BEFORE = "<|im_start|>user\nAnswer the question by the documents.\n\n"
AFTER = "Question: {question}<|im_end|>\n<|im_start|>assistant\n{start}"
WINDOW = 56  # tokens that a natural document is cut to
_FIRST = (
    "Alder Birch Cedar Clover Copper Falcon Granite Harbor Juniper Lantern Maple Marble Meadow Orchid Otter Pebble "
)
_FIRST += "Raven Saffron Silver Thistle Walnut Willow"
_SECOND = "Bridge Field Ford Gate Grove Hill Lake Mill Point Ridge Rock Valley"
_PEOPLE = "Anna Boris Carla David Elena Felix Greta Henry Irene Jonas Karen Lucas Maria Nolan Olga Peter Rosa Simon "
_PEOPLE += "Tanya Victor"
_SURNAMES = (
    "Abbott Becker Collins Dalton Everett Foster Griffin Hudson Irving Jensen Keller Lawson Mercer Norton Osborne "
)
_SURNAMES += "Parker Quinn Russell Sutton Turner"
_KNOWN = "glass paper honey bells boats clocks wool salt cheese pianos candles knives"
_RIVERS = (
    "Danube Rhine Thames Nile Volga Seine Loire Tiber Ebro Elbe Oder Vistula Ganges Indus Amazon Congo Niger Mekong "
)
_RIVERS += "Douro Po"


@dataclass(frozen=True)
class Prompt:
    """A question on documents.

    Attributes:
        sources: texts that documents draw on, of two-hop questions; none otherwise.
        documents: the others.
        question: what is asked.
        start: how the answer begins, which is given.
        answer: what is scored.
    """

    sources: tuple[str, ...]
    documents: tuple[str, ...]
    question: str
    start: str
    answer: str


def one_hop(count: int, number: int) -> Prompt:
    """One of the documents says who the mayor of the town is."""
    draw = np.random.default_rng((1, count, number))
    towns, people = _towns(draw, count), _names(draw, count)
    known = draw.choice(_KNOWN.split(), count)
    documents = tuple(
        f"{town} is a small town that is known for its {thing}. The mayor of {town} is {person}.\n\n"
        for town, thing, person in zip(towns, known, people, strict=True)
    )
    place = int(draw.integers(count))
    return Prompt(
        (), documents, f"Who is the mayor of {towns[place]}?", f"The mayor of {towns[place]} is", people[place]
    )


def two_hops(count: int, number: int) -> Prompt:
    """A document says where a person works, a source on which river that town is."""
    draw = np.random.default_rng((2, count, number))
    half = count // 2
    towns, people = _towns(draw, half), _names(draw, half)
    rivers = draw.permutation(_RIVERS.split())[:half]
    sources = tuple(f"{town} is a town on the river {river}.\n\n" for town, river in zip(towns, rivers, strict=True))
    order = draw.permutation(half)
    documents = tuple(f"{people[n]} lives and works in {towns[n]}.\n\n" for n in order)
    place = int(draw.integers(half))
    question = f"On which river is the town in which {people[place]} lives?"
    return Prompt(sources, documents, question, f"{people[place]} lives on the river", str(rivers[place]))


def natural(path: Path, tokenizer: Any) -> list[Prompt]:
    """Questions of LongBench's hotpotqa, whose passages are cut to a window: those with the answer around it."""
    found = []
    for row in json.loads(path.read_text("utf-8")).values():
        context, _, rest = (
            row["origin_prompt"]
            .partition("The following are given passages.\n")[2]
            .rpartition("\n\nAnswer the question based on")
        )
        answer, question = row["gold"][0], re.search(r"Question: (.*)\n?Answer:", rest, re.S)
        passages = re.split(r"Passage \d+:\n", context)[1:]
        if question is None or answer in ("yes", "no") or not any(answer in passage for passage in passages):
            continue  # answers of yes and no stand nowhere
        documents = []
        for passage in passages:
            title, _, body = passage.partition("\n")
            ids = tokenizer(body[: max(0, body.find(answer))], add_special_tokens=False)["input_ids"]
            text = tokenizer(body, add_special_tokens=False, verbose=False)["input_ids"]
            first = max(0, len(ids) - WINDOW // 2)
            documents.append(f"{title}: {tokenizer.decode(text[first : first + WINDOW]).strip()}\n\n")
        found.append(Prompt((), tuple(documents), question[1].strip(), "The answer is", answer))
    return found


def _towns(draw: np.random.Generator, count: int) -> list[str]:
    every = [f"{first} {second}" for first in _FIRST.split() for second in _SECOND.split()]
    return [every[place] for place in draw.permutation(len(every))[:count]]


def _names(draw: np.random.Generator, count: int) -> list[str]:
    first, last = draw.permutation(_PEOPLE.split())[:count], draw.permutation(_SURNAMES.split())[:count]
    return [f"{one} {other}" for one, other in zip(first, last, strict=True)]
