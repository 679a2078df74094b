"""CHAIR (arXiv 1809.02156): captions from a vision-language model, and the objects that their images really show."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from ...files.documents import quoted, read_json
from ..metrics.chair import Chair, SynonymTable
from .vlm import GenerationSettings, Request, answer, files_in


def read_objects(path: str | os.PathLike[str], pattern: str = "COCO_val2014_{:012d}.jpg") -> dict[str, list[str]]:
    """The objects of COCO images from a JSON file with image id to list of objects.

    Args:
        path: the file.
        pattern: how an image's file is called, given its id.

    Returns:
        Name of the image's file to its objects.

    Raises:
        ValueError: the file is missing, not valid JSON, or of other content; the message names it, and the line or
            the image id.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, got a {type(content).__name__}.")
    for number, names in content.items():
        if not number.isdecimal() or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path}, {number!r}: expected an image id and a list of names, got {quoted(names)}.")
    return {pattern.format(int(number)): names for number, names in content.items()}


def objects_from_coco(
    instances: Iterable[str | os.PathLike[str]],
    captions: Iterable[str | os.PathLike[str]],
    synonyms: str | os.PathLike[str],
) -> dict[str, list[str]]:
    """What images show, as CHAIR defines it: the segmented objects, and those that people's captions name.

    Args:
        instances: COCO's files of that name, such as `instances_val2014.json`.
        captions: COCO's files of that name, such as `captions_val2014.json`.
        synonyms: path of the synonym table.

    Returns:
        Name of the image's file to its objects, sorted.

    Raises:
        ValueError: a missing or strange file, or a category that is not in the table.
    """
    table = SynonymTable(synonyms)
    files: dict[int, str] = {}
    found: dict[int, set[str]] = {}
    for path in instances:
        content = _annotations(path, "categories")
        files |= {image["id"]: image["file_name"] for image in content["images"]}
        categories = {category["id"]: category["name"] for category in content["categories"]}
        if unknown := sorted(set(categories.values()) - table.names):
            raise ValueError(f"{path}: the categories {', '.join(unknown)} are not in {synonyms}.")
        for annotation in content["annotations"]:
            found.setdefault(annotation["image_id"], set()).add(categories[annotation["category_id"]])
    for path in captions:
        content = _annotations(path)
        files |= {image["id"]: image["file_name"] for image in content["images"]}
        for annotation in content["annotations"]:
            found.setdefault(annotation["image_id"], set()).update(table.mentions(annotation["caption"]))
    return {name: sorted(found.get(number, ())) for number, name in files.items()}


def run_chair(
    model: Any,
    processor: Any,
    objects: Mapping[str, list[str]],
    images: str | os.PathLike[str],
    synonyms: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    prompt: str = "Generate a short caption of this image.",
    **generation: Any,
) -> dict[str, float]:
    """Let a vision-language model caption images and count what it invents; a run that was killed continues.

    Args:
        model: a transformers model that generates from images and text, patched or not.
        processor: of the model.
        objects: name of each image's file to the objects it shows; all of these images are captioned, in this order.
        images: folder with them.
        synonyms: path of the synonym table; see `patchattn.evaluation.metrics.chair.SynonymTable`.
        output: results file, with `image` and `answer` per line; see `patchattn.evaluation.tasks.vlm.answer`.
        prompt: the request.
        generation: fields of `GenerationSettings`; `max_new_tokens` is 64 unless given.

    Returns:
        The scores; see `patchattn.evaluation.metrics.chair.chair_scores`.

    Raises:
        ValueError: missing images, a bad table, a results file of another run, or an unknown or bad setting.
        TypeError: a setting of the wrong type.
    """
    settings = GenerationSettings.from_dict({"max_new_tokens": 64, **generation})
    SynonymTable(synonyms)  # what is wrong with it is said before the model runs
    files = files_in(images, list(objects))
    requests = [Request({"image": name}, file, prompt) for name, file in zip(objects, files, strict=True)]
    captions = answer(model, processor, requests, output, settings)
    return Chair(keep_in_memory=True).compute(
        predictions=captions, references=list(objects.values()), synonyms=os.fspath(synonyms)
    )


def _annotations(path: str | os.PathLike[str], *more: str) -> dict[str, Any]:
    content = read_json(path)
    keys = ("images", "annotations", *more)
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        raise ValueError(f"{path} must hold an object with lists under {', '.join(keys)}, as COCO's annotations do.")
    return content
