"""Objects of generated pictures, some more frequent than others, some in company: what a model can guess at unseen."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

Kind = Literal["random", "popular", "adversarial"]
KINDS: tuple[Kind, ...] = ("random", "popular", "adversarial")

_COMPANY = 0.6  # probability that an object is a companion of one that is there


class Company:
    """Names of objects, how frequent each is, and which come together, as plates and forks do.

    Args:
        names: of all objects, more than seven and no multiple of seven.
        frequent: how many of them are popular.

    Raises:
        ValueError: another number of names.
    """

    def __init__(self, names: Sequence[str], frequent: int) -> None:
        if len(names) < 8 or len(names) % 7 == 0:
            raise ValueError(f"Names must be more than 7 and no multiple of it, got {len(names)}.")
        self.names = tuple(names)
        weights = 1.0 / (np.arange(len(names)) * 7 % len(names) + 2.0)  # 7 spreads neighbours in the list
        self.popularity = weights / weights.sum()
        self.popular = tuple(self.names[index] for index in np.argsort(-weights)[:frequent])

    def companions(self, name: str) -> tuple[str, ...]:
        """The two objects that are often seen with one."""
        index = self.names.index(name)
        return tuple(self.names[(index + step) % len(self.names)] for step in (3, -3))

    def together(self, draw: np.random.Generator, most: int) -> list[str]:
        """Different objects of a picture, one to `most`, in the order in which they came."""
        names: list[str] = []
        for _ in range(int(draw.integers(1, most + 1))):
            near = [name for seen in names for name in self.companions(seen) if name not in names]
            if near and draw.random() < _COMPANY:
                names.append(near[int(draw.integers(len(near)))])
            else:
                weights = np.where([name in names for name in self.names], 0.0, self.popularity)
                names.append(self.names[int(draw.choice(len(self.names), p=weights / weights.sum()))])
        return names

    def absent(self, objects: Sequence[str], kind: Kind, seed: tuple[int, ...]) -> str:
        """An object that is not among these: any, one of the most frequent, or a companion of one that is.

        Where everything of that kind is there, any.
        """
        others = [name for name in self.names if name not in objects]
        if kind == "popular":
            others = [name for name in self.popular if name not in objects] or others
        elif kind == "adversarial":
            others = [name for seen in objects for name in self.companions(seen) if name not in objects] or others
        return others[int(np.random.default_rng((*seed, 2, KINDS.index(kind))).integers(len(others)))]

    def present(self, objects: Sequence[str], seed: tuple[int, ...]) -> str:
        """One of these objects."""
        return objects[int(np.random.default_rng((*seed, 3)).integers(len(objects)))]
