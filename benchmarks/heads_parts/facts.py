"""Questions of which a small model knows many, and contexts that say something else: as NQ-Swap is made, but ours."""

from dataclasses import dataclass

import numpy as np

# of each kind: a sentence that says it, a question, and what is known
KINDS = {
    "capital": (
        "{answer} is the capital of {of}. The parliament of {of} meets in {answer}.",
        "What is the capital of {of}?",
        "France:Paris Japan:Tokyo Italy:Rome Spain:Madrid Germany:Berlin Russia:Moscow China:Beijing Egypt:Cairo "
        "Kenya:Nairobi Greece:Athens Cuba:Havana Peru:Lima Austria:Vienna Norway:Oslo Sweden:Stockholm Ireland:Dublin "
        "Portugal:Lisbon Poland:Warsaw Hungary:Budapest Thailand:Bangkok Finland:Helsinki Denmark:Copenhagen "
        "Belgium:Brussels Turkey:Ankara Iran:Tehran Iraq:Baghdad Chile:Santiago Canada:Ottawa Australia:Canberra "
        "Indonesia:Jakarta Vietnam:Hanoi Romania:Bucharest Bulgaria:Sofia Serbia:Belgrade Ukraine:Kyiv Morocco:Rabat "
        "Nepal:Kathmandu Senegal:Dakar Colombia:Bogota Venezuela:Caracas",
    ),
    "currency": (
        "In {of} people pay with the {answer}. The {answer} has been the currency of {of} for years.",
        "What is the currency of {of}?",
        "Japan:yen India:rupee Russia:ruble Mexico:peso China:yuan Thailand:baht Poland:zloty Israel:shekel "
        "Brazil:real Vietnam:dong",
    ),
    "author": (
        "{of} was written by {answer}. It is the best-known work of {answer}.",
        "Who wrote {of}?",
        "Hamlet:Shakespeare Frankenstein:Shelley Dracula:Stoker Ulysses:Joyce Emma:Austen Faust:Goethe "
        "Inferno:Dante Odyssey:Homer Candide:Voltaire Walden:Thoreau",
    ),
    "language": (
        "The people of {of} speak {answer}. {answer} is the official language of {of}.",
        "What is the official language of {of}?",
        "Brazil:Portuguese Mexico:Spanish Austria:German Iran:Persian Egypt:Arabic Japan:Japanese Greece:Greek "
        "Poland:Polish",
    ),
}


@dataclass(frozen=True)
class Fact:
    """A question.

    Attributes:
        question: itself.
        known: the answer.
        context: sentences that say another one.
        swapped: that other answer, a known answer to another question of the kind.
    """

    question: str
    known: str
    context: str
    swapped: str


def facts(seed: int = 0) -> list[Fact]:
    """All of them, in an order that is drawn; swaps are drawn without one that is true."""
    draw = np.random.default_rng(seed)
    found = []
    for sentence, question, pairs in KINDS.values():
        known = dict(pair.split(":") for pair in pairs.split())
        for of, answer in known.items():
            other = str(draw.choice([each for each in known.values() if each != answer]))
            found.append(Fact(question.format(of=of), answer, sentence.format(of=of, answer=other), other))
    return [found[place] for place in draw.permutation(len(found))]
