"""POPE and CHAIR as tasks of `patchattn eval`, for vision-language models."""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...core.settings import option
from ..metrics.chair import chair_scores
from ..metrics.pope import pope_scores
from .chair import read_objects
from .pope import pope_requests, read_pope
from .task import EvalTask, ModelKind, Row
from .vlm import GenerationSettings, Request, check_images, check_processor, files_in, generate_answers


@dataclass(frozen=True, kw_only=True)
class PopeSettings(GenerationSettings):
    """Which questions are asked, and how."""

    questions: str = option(help="Official file of POPE's questions.")
    images: str = option(help="Folder with the images that the questions are about.")
    suffix: str = option(
        "", help="Text that is put after each question, such as 'Please answer this question with one word.'."
    )


@dataclass(frozen=True, kw_only=True)
class ChairSettings(GenerationSettings):
    """Which images are captioned, and what they show."""

    objects: str = option(help="JSON file with the objects of every image by COCO's image id; see read_objects.")
    images: str = option(help="Folder with the images.")
    synonyms: str = option(help="The table of objects and their synonyms.")
    pattern: str = option("COCO_val2014_{:012d}.jpg", help="How an image's file is called, given its id.")
    prompt: str = option("Generate a short caption of this image.", help="Request that every image is described by.")
    max_new_tokens: int = option(64, help="Longest answer.", unit="tokens", minimum=1)


class ImageTask(EvalTask):
    """Requests about images.

    Args:
        settings: fields of `settings_class`; `batch` is the runner's.

    Raises:
        TypeError, ValueError: a wrong or unknown setting, a file that cannot be read, or missing images.
    """

    kind: ClassVar[ModelKind] = "vision_language"
    settings_class: ClassVar[type[GenerationSettings]]
    places: ClassVar[tuple[str, ...]]  # settings that say where files are, which may move

    def __init__(self, **settings: Any) -> None:
        if "batch" in settings:
            raise ValueError(f"batch is not a setting of {self.name}: give it to the runner.")
        self.settings: Any = self.settings_class.from_dict(settings)
        self.requests = self.read()
        check_images(self.requests)

    @abstractmethod
    def read(self) -> list[Request]:
        """What is asked; whatever scoring needs is in the fields."""

    def __len__(self) -> int:
        return len(self.requests)

    def identity(self) -> Mapping[str, Any]:
        """The settings, but for the places of files and what is the runner's, and a digest of the requests."""
        asked = [[request.fields, request.image.name, request.text] for request in self.requests]
        settings = {key: value for key, value in self.settings.to_dict().items() if key not in ("batch", *self.places)}
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        return {"task_settings": settings, "requests_sha256": digest}

    def check_model(self, model: Any, tokenizer: Any) -> None:
        """ValueError for a processor without chat template where none is given, or without padding token."""
        check_processor(tokenizer, self.settings)

    def answer(self, model: Any, tokenizer: Any, indices: Sequence[int]) -> list[Row]:
        """The fields of the requests, and `answer`."""
        batch = [self.requests[index] for index in indices]
        seed = self.settings.seed * 1_000_003 + indices[0]
        texts, cost = generate_answers(model, tokenizer, batch, self.settings, seed)
        return [{**request.fields, "answer": text, **cost.row()} for request, text in zip(batch, texts, strict=True)]


class PopeTask(ImageTask):
    """`pope`: yes/no questions after objects; see `patchattn.evaluation.tasks.pope`. Scores are times 100."""

    name = "pope"
    main_score = "accuracy"
    settings_class = PopeSettings
    places = ("questions", "images")

    def read(self) -> list[Request]:
        """The questions of the file."""
        return pope_requests(read_pope(self.settings.questions), self.settings.images, self.settings.suffix)

    def score(self, rows: Sequence[Row]) -> dict[str, float]:
        """See `patchattn.evaluation.metrics.pope.pope_scores`."""
        scores = pope_scores([row["answer"] for row in rows], [row["label"] for row in rows])
        return {name: 100 * value for name, value in scores.items()}


class ChairTask(ImageTask):
    """`chair`: captions; see `patchattn.evaluation.tasks.chair`. Shares are times 100."""

    name = "chair"
    main_score = "chair_i"
    higher_is_better = False
    settings_class = ChairSettings
    places = ("objects", "images", "synonyms")

    def read(self) -> list[Request]:
        """The images of the file of objects."""
        objects = read_objects(self.settings.objects, self.settings.pattern)
        chair_scores([""] * len(objects), list(objects.values()), self.settings.synonyms)  # what is wrong is said now
        files = files_in(self.settings.images, list(objects))
        return [
            Request({"image": name, "objects": objects[name]}, file, self.settings.prompt)
            for name, file in zip(objects, files, strict=True)
        ]

    def score(self, rows: Sequence[Row]) -> dict[str, float]:
        """See `patchattn.evaluation.metrics.chair.chair_scores`."""
        scores = chair_scores([row["answer"] for row in rows], [row["objects"] for row in rows], self.settings.synonyms)
        return {name: 100 * value if name in _SHARES else value for name, value in scores.items()}


_SHARES = ("chair_s", "chair_i", "recall")
