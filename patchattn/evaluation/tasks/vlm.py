"""Answers of a vision-language model to prompts about images: batched, resumable, the same in every run."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import track

from ...core.selection import evaluating
from ...core.settings import Settings, option
from .cost import Cost, measured
from .results import claim, model_identity, read_done


@dataclass(frozen=True, kw_only=True)
class GenerationSettings(Settings):
    """How answers are generated.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range, or temperature or top_p without do_sample.
    """

    template: str | None = option(
        None,
        help="The whole prompt with {text} where the request belongs, and the model's image token if it has one, such "
        "as 'USER: <image>\\n{text} ASSISTANT:'; None: the processor's chat template.",
    )
    batch: int = option(8, help="Prompts per call of generate.", minimum=1)
    max_new_tokens: int = option(16, help="Longest answer.", unit="tokens", minimum=1)
    do_sample: bool = option(False, help="Draw from the whole distribution; else the likeliest token is taken.")
    temperature: float = option(1.0, help="Temperature of sampling.", minimum=1e-3)
    top_p: float = option(1.0, help="Share of the probability that sampling keeps.", minimum=1e-3, maximum=1.0)
    seed: int = option(0, help="Seed of sampling.", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template is not None and "{text}" not in self.template:
            raise ValueError(f"template must hold {{text}}, where the request belongs, got {self.template!r}.")
        if not self.do_sample and (self.temperature != 1 or self.top_p != 1):
            raise ValueError("temperature and top_p have no effect without do_sample=True.")

    def arguments(self) -> dict[str, Any]:
        """What `generate` takes."""
        length = {"max_new_tokens": self.max_new_tokens, "num_beams": 1}
        if not self.do_sample:
            return {**length, "do_sample": False}
        # transformers keeps the 50 likeliest tokens unless told otherwise
        return {**length, "do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@dataclass(frozen=True)
class Request:
    """What is asked about one image.

    Attributes:
        fields: what the results file says of it beside the answer, JSON types; no two requests have the same.
        image: the file.
        text: the request.
    """

    fields: Mapping[str, Any]
    image: Path
    text: str


def answer(
    model: Any,
    processor: Any,
    requests: Sequence[Request],
    output: str | os.PathLike[str],
    settings: GenerationSettings | None = None,
) -> list[str]:
    """Ask a model about images, one request at a time as far as the answers show.

    Answers are appended to `output` as they come, one JSON object per line: the fields of the request and `answer`. A
    run that was killed continues where it stopped, with the same answers as one that was not: batches are the same in
    both, and sampling is seeded per batch. What the run was made with lies beside it in `<output>.settings.json`.

    Args:
        model: a model that generates, patched or not; it is put into evaluation mode for the time.
        processor: of the model.
        requests: in order.
        output: results file, by convention `.jsonl`.
        settings: how answers are generated.

    Returns:
        The answers, in order.

    Raises:
        ValueError: no requests; missing images (the message names the folder); `output` holds another run, the
            message names what differs; a processor without chat template where none is given; or without padding token.
    """
    settings = settings or GenerationSettings()
    path = Path(output)
    if not requests:
        raise ValueError("There is nothing to ask: no requests.")
    check_images(requests)
    check_processor(processor, settings)
    claim(path, _identity(model, requests, settings))
    done = [row["answer"] for row in read_done(path, [request.fields for request in requests], "answer")]
    ends = {start: min(start + settings.batch, len(requests)) for start in range(0, len(requests), settings.batch)}
    starts = [start for start, end in ends.items() if end > len(done)]
    with evaluating(model), path.open("a", encoding="utf-8") as file:
        for start in track(starts, description="Answering", disable=not sys.stderr.isatty() or not starts):
            batch = requests[start : ends[start]]
            texts, _ = generate_answers(model, processor, batch, settings, settings.seed * 1_000_003 + start)
            for request, text in list(zip(batch, texts, strict=True))[max(len(done) - start, 0) :]:
                file.write(json.dumps({**request.fields, "answer": text}, ensure_ascii=False) + "\n")
                done.append(text)
            file.flush()
    return done


def files_in(folder: str | os.PathLike[str], names: Sequence[str]) -> list[Path]:
    """Paths of images in a folder, which may lack them; ValueError if there is no such folder."""
    if not Path(folder).is_dir():
        raise ValueError(f"There is no image folder {str(folder)!r}.")
    return [Path(folder) / name for name in names]


def check_images(requests: Sequence[Request]) -> None:
    """ValueError if images are missing; the message names the folder."""
    missing = sorted({request.image for request in requests if not request.image.is_file()})
    if missing:
        some = ", ".join(path.name for path in missing[:3])
        total = len({request.image for request in requests})
        raise ValueError(f"{missing[0].parent} lacks {len(missing)} of the {total} images, such as {some}.")


def check_processor(processor: Any, settings: GenerationSettings) -> None:
    """ValueError for a processor without chat template where none is given, or without padding token."""
    name = type(processor).__name__
    if settings.template is None and not getattr(processor, "chat_template", None):
        raise ValueError(f"{name} has no chat template: give template=, such as 'USER: <image>\\n{{text}} ASSISTANT:'.")
    if processor.tokenizer.pad_token is None:
        raise ValueError(
            f"The tokenizer of {name} has no padding token: set tokenizer.pad_token, for example to its eos_token."
        )


def _prompt(processor: Any, request: Request, settings: GenerationSettings) -> str:
    if settings.template is not None:
        return settings.template.replace("{text}", request.text)
    content = [{"type": "image"}, {"type": "text", "text": request.text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def generate_answers(
    model: Any, processor: Any, batch: Sequence[Request], settings: GenerationSettings, seed: int
) -> tuple[list[str], Cost]:
    """The answers to one batch, and what generating them cost, without reading and preparing the images.

    The caller's random numbers go on as if nothing had been drawn.
    """
    prompts = [_prompt(processor, request, settings) for request in batch]
    bos = processor.tokenizer.bos_token
    # some templates write the token of the beginning themselves
    once = {"add_special_tokens": False} if bos is not None and prompts[0].startswith(bos) else {}
    with _left_padded(processor.tokenizer):
        inputs = processor(
            images=[_image(request.image) for request in batch],
            text=prompts,
            padding=True,
            return_tensors="pt",
            **once,
        ).to(model.device, model.dtype)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode(), measured(model) as cost:
        torch.manual_seed(seed)
        tokens = model.generate(**inputs, **settings.arguments(), stopping_criteria=[cost])
    given = inputs["input_ids"]
    length = given.shape[1]
    if tokens.shape[1] >= length and torch.equal(tokens[:, :length], given):  # models with a decoder return no prompt
        tokens = tokens[:, length:]
    return [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)], cost


def _image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # all of which Pillow raises
        raise ValueError(f"{path} is not a readable image: {error}") from error


@contextmanager
def _left_padded(tokenizer: Any) -> Iterator[None]:
    """Only the language model's tokenizer: a Q-Former's counts positions from the left, padding included."""
    before, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        yield
    finally:
        tokenizer.padding_side = before


def _identity(model: Any, requests: Sequence[Request], settings: GenerationSettings) -> dict[str, Any]:
    """What must not change between the starts of one run; images may move."""
    asked = [[request.fields, request.image.name, request.text] for request in requests]
    return {
        **model_identity(model),
        "requests": len(requests),
        "requests_sha256": hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest(),
        **settings.to_dict(),
    }
