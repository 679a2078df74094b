"""Pictures put together from photographs of known classes, with captions and yes/no questions, generated from seeds.

One to four photographs, each of another class, stand in the quarters of a picture. As in `shapes`, some classes are far
more frequent than others and some come in company, so that a model can guess at what it does not see.
"""

import io
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .company import Company, Kind

CELLS = 2  # along a side: a picture has four quarters
FREQUENT = 3  # classes that are popular
CAPTION_REQUEST = "What is in the image?"
_GREY = (110, 110, 110)


class Photos:
    """Photographs of a zip file, as `split/class/name.jpg`, each class in the order of names.

    Args:
        path: of the file, such as CIFAR-10 as JPEG.

    Raises:
        ValueError: no such file, no zip file, or a number of classes that `Company` refuses.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not Path(path).is_file() or not zipfile.is_zipfile(path):
            raise ValueError(f"There is no zip file {str(path)!r} with photographs as split/class/name.jpg.")
        self._archive = zipfile.ZipFile(path)
        self._names: dict[str, list[str]] = {}
        for name in sorted(self._archive.namelist()):
            parts = name.split("/")
            if len(parts) >= 2 and name.lower().endswith((".jpg", ".jpeg", ".png")):
                self._names.setdefault(parts[-2], []).append(name)
        self.company = Company(list(self._names), FREQUENT)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, sorted as in the file."""
        return self.company.names

    def count(self, name: str) -> int:
        """Photographs of a class."""
        return len(self._names[name])

    def photo(self, name: str, number: int) -> Image.Image:
        """A photograph of a class in RGB."""
        return Image.open(io.BytesIO(self._archive.read(self._names[name][number]))).convert("RGB")

    def scene(self, seed: int, index: int) -> "Scene":
        """The picture of that number in the sequence of that seed."""
        draw = np.random.default_rng((seed, index))
        names = self.company.together(draw, CELLS**2)
        cells = sorted(int(cell) for cell in draw.choice(CELLS**2, len(names), replace=False))
        numbers = tuple(int(draw.integers(self.count(name))) for name in names)
        return Scene(self, tuple(names), tuple(cells), numbers, (seed, index))


@dataclass(frozen=True, eq=False)
class Scene:
    """What one picture shows.

    Attributes:
        photos: that it is made from.
        objects: classes, in reading order.
        cells: quarters, one per object, counted from the top left.
        numbers: of the photographs within their classes.
        seed: of everything random in the picture and the questions.
    """

    photos: Photos
    objects: tuple[str, ...]
    cells: tuple[int, ...]
    numbers: tuple[int, ...]
    seed: tuple[int, int]

    def caption(self) -> str:
        """All objects in reading order."""
        names = [with_article(name) for name in self.objects]
        listed = " and ".join([*([", ".join(names[:-1])] if names[1:] else []), names[-1]])
        return f"There is {listed}."

    def picture(self, side: int) -> Image.Image:
        """The picture in RGB, `side` pixels wide and high: photographs enlarged to a quarter each, the rest is grey."""
        image, width = Image.new("RGB", (side, side), _GREY), side // CELLS
        for name, cell, number in zip(self.objects, self.cells, self.numbers, strict=True):
            photo = self.photos.photo(name, number).resize((width, width), Image.Resampling.BICUBIC)
            image.paste(photo, (cell % CELLS * width, cell // CELLS * width))
        return image

    def absent(self, kind: Kind) -> str:
        """A class that is not there: any, one of the most frequent, or a companion of one that is."""
        return self.photos.company.absent(self.objects, kind, self.seed)

    def present(self) -> str:
        """One of the objects."""
        return self.photos.company.present(self.objects, self.seed)


def with_article(name: str) -> str:
    """A name with its indefinite article."""
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def question(name: str) -> str:
    """POPE's question after an object."""
    return f"Is there {with_article(name)} in the image?"


def synonym_table(classes: Sequence[str]) -> str:
    """The classes as the text of a file for CHAIR, each with its own name alone."""
    return "".join(f"{name}\n" for name in classes)
