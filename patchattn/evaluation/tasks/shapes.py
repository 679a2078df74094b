"""Pictures of coloured shapes with captions and yes/no questions, generated from seeds: what a tiny VLM learns.

Some objects are far more frequent than others, and some come in pairs more often than not, as plates and forks do. So a
model can guess at what it does not see, and the questions of POPE's three kinds ask for just that.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .company import KINDS as KINDS  # of questions, for those that ask about shapes
from .company import Company, Kind

COLOURS = {
    "red": (215, 45, 45),
    "green": (50, 170, 60),
    "blue": (50, 80, 215),
    "yellow": (225, 205, 50),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "cross")
OBJECTS = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
SYNONYMS = {"circle": "disc", "square": "box", "triangle": "wedge", "cross": "plus"}  # never in our own captions
SIDE, CELLS = 48, 3  # of a picture in pixels, and of the grid that keeps objects apart
MOST_OBJECTS = 4

CAPTION_REQUEST = "What is in the image?"

COMPANY = Company(OBJECTS, frequent=5)


def question(name: str) -> str:
    """POPE's question after an object."""
    return f"Is there a {name} in the image?"


def companions(name: str) -> tuple[str, ...]:
    """The two objects that are often seen with one."""
    return COMPANY.companions(name)


@dataclass(frozen=True)
class Scene:
    """What one picture shows.

    Attributes:
        objects: names, in reading order.
        cells: of the grid, one per object, counted from the top left.
        seed: of everything random in the picture and the questions.
    """

    objects: tuple[str, ...]
    cells: tuple[int, ...]
    seed: tuple[int, int]

    def caption(self) -> str:
        """All objects in reading order."""
        return "there is " + " and ".join(f"a {name}" for name in self.objects)

    def picture(self) -> Image.Image:
        """The picture in RGB, `SIDE` pixels wide and high: shapes of varying size and place on noisy grey."""
        noise = np.random.default_rng((*self.seed, 1))
        grey = noise.normal(noise.uniform(60, 130), 8, (SIDE, SIDE, 1)).clip(0, 255)
        image = Image.fromarray(np.broadcast_to(grey, (SIDE, SIDE, 3)).astype(np.uint8))
        draw, width = ImageDraw.Draw(image), SIDE // CELLS
        for name, cell in zip(self.objects, self.cells, strict=True):
            colour, shape = name.split()
            radius = int(noise.integers(5, 8))
            shift = noise.integers(radius, width - radius + 1, 2)
            _draw(
                draw, shape, COLOURS[colour], cell % CELLS * width + shift[0], cell // CELLS * width + shift[1], radius
            )
        return image

    def absent(self, kind: Kind) -> str:
        """An object that is not there: any, one of the five most frequent, or a companion of one that is.

        Where everything of that kind is there, any.
        """
        return COMPANY.absent(self.objects, kind, self.seed)

    def present(self) -> str:
        """One of the objects."""
        return COMPANY.present(self.objects, self.seed)


def scene(seed: int, index: int) -> Scene:
    """The picture of that number in the sequence of that seed."""
    draw = np.random.default_rng((seed, index))
    names = COMPANY.together(draw, MOST_OBJECTS)
    cells = sorted(int(cell) for cell in draw.choice(CELLS * CELLS, len(names), replace=False))
    return Scene(tuple(names), tuple(cells), (seed, index))


def scenes(seed: int, count: int) -> Iterator[Scene]:
    """The first pictures of a seed's sequence."""
    return (scene(seed, index) for index in range(count))


def synonym_table() -> str:
    """The objects and their synonyms as the text of a file for CHAIR."""
    pairs = (name.split() for name in OBJECTS)
    return "".join(f"{colour} {shape}, {colour} {SYNONYMS[shape]}\n" for colour, shape in pairs)


def _draw(draw: ImageDraw.ImageDraw, shape: str, colour: tuple[int, int, int], x: int, y: int, radius: int) -> None:
    box = (x - radius, y - radius, x + radius - 1, y + radius - 1)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle((box[0] + 1, box[1] + 1, box[2] - 1, box[3] - 1), fill=colour)
    elif shape == "triangle":
        draw.polygon([(x, box[1]), (box[0], box[3]), (box[2], box[3])], fill=colour)
    else:
        arm = radius // 3
        draw.rectangle((x - arm, box[1], x + arm - 1, box[3]), fill=colour)
        draw.rectangle((box[0], y - arm, box[2], y + arm - 1), fill=colour)
