"""CARVE: what a question draws more attention to than others do is cut out, and shown again. arXiv 2509.06461."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..core.call import AttentionCall
from ..core.selection import base_model, evaluating, select_sites
from ..vision.prompts import image_prompt
from ..vision.regions import regions
from .attention_maps import head_weights, image_place, look, of_row

LAYERS = (20, 21, 22, 23, 24, 25)
GENERAL = "Write a general description of the image."
SUFFIX = "Answer the question using a single word or phrase."
_EPSILON = 1e-8


@dataclass(frozen=True, eq=False)
class Carved:
    """What CARVE found.

    Attributes:
        before: the answer to the picture alone.
        answer: that to the picture and what was cut out of it.
        contrast: `(height, width)` float64: attention of the question over that of the general instruction, summed over
            steps and layers, at the picture's size.
        kept: `(height, width)` bool: what stays of the picture.
        box: left, top, right and bottom in pixels, around it.
        cut: the PIL image of it, black where nothing was kept, enlarged to the picture's size at least.
    """

    before: str
    answer: str
    contrast: torch.Tensor
    kept: torch.Tensor
    box: tuple[int, int, int, int]
    cut: Any


@torch.no_grad()
def carve(
    model: Any,
    processor: Any,
    image: Any,
    question: str,
    *,
    general: str = GENERAL,
    suffix: str = SUFFIX,
    layers: Sequence[int] = LAYERS,
    steps: int = 32,
    share: float = 0.2,
    least: int = 3,
) -> Carved:
    """Answer a question about a picture with the help of the parts of it that the question draws attention to.

    Three passes: answers to the question and to the general instruction, whose attention to the picture is compared
    token by token, and the answer to the question with the picture and the cut.

    Args:
        model: a LLaVA-1.5, LLaVA-NeXT (the whole picture, not its tiles) or Qwen2.5-VL, patched or not.
        processor: its processor.
        image: PIL image in RGB.
        question: about it.
        general: an instruction that asks about nothing in particular.
        suffix: behind both.
        layers: of the language model, from 0; the paper's are of models with 28 layers and more.
        steps: tokens of each answer at most.
        share: of the picture's pixels that are kept, and of their regions.
        least: regions that are kept at least, those with the largest sum.

    Raises:
        ValueError: no such layer, a share that is not above 0 and at most 1, no step or region; or as `image_prompt`.
        NotImplementedError: as `image_attention`.
    """
    if not 0 < share <= 1 or min(steps, least) < 1:
        raise ValueError(
            f"share must be above 0 and at most 1, steps and least at least 1, got {share}, {steps} and {least}."
        )
    width, height = image.size

    def asked(text: str) -> tuple[str, torch.Tensor]:
        inputs = image_prompt(processor, [image], f"{text} {suffix}", model)
        said = _written(model, inputs, steps)
        return processor.decode(said[0], skip_special_tokens=True).strip(), _maps(model, inputs, said, layers)

    before, own = asked(question)
    _, any_question = asked(general)
    count = min(len(own), len(any_question))
    ratio = ((own[:count] + _EPSILON) / (any_question[:count] + _EPSILON)).sum(1)
    weighed = (ratio * torch.arange(1, count + 1, dtype=ratio.dtype)[:, None, None]).sum(0)
    contrast = F.interpolate(weighed[None, None], size=(height, width), mode="bilinear", antialias=True)[0, 0]
    kept = kept_parts(contrast, share, least)
    places = kept.nonzero()
    (top, left), (bottom, right) = places.amin(0).tolist(), (places.amax(0) + 1).tolist()
    box = (left, top, right, bottom)
    cut = _cut(image, kept, box)
    inputs = image_prompt(processor, [image, cut], f"{question} {suffix}", model)
    answer = processor.decode(_written(model, inputs, steps)[0], skip_special_tokens=True).strip()
    return Carved(before, answer, contrast, kept, box, cut)


def kept_parts(contrast: torch.Tensor, share: float, least: int) -> torch.Tensor:
    """`(height, width)` bool: of the largest values of a map, the regions with the largest sums.

    Args:
        contrast: `(height, width)`.
        share: of the map's cells, and of the regions that these make.
        least: regions at least.
    """
    threshold = float(np.quantile(contrast.cpu().numpy(), 1 - share))  # torch's takes no more than 2^24 numbers
    parts = regions(contrast >= threshold - 1e-9 * abs(threshold))
    parts = sorted(parts, key=lambda part: -float(contrast[part[:, 0], part[:, 1]].sum()))
    kept = torch.zeros_like(contrast, dtype=torch.bool)
    for part in parts[: max(least, int(len(parts) * share))]:
        kept[part[:, 0], part[:, 1]] = True
    return kept


def _written(model: Any, inputs: dict[str, Any], steps: int) -> torch.Tensor:
    """`(1, n)` a greedy answer."""
    with evaluating(base_model(model)):
        whole = model.generate(**inputs, max_new_tokens=steps, do_sample=False)
    return whole[:, inputs["input_ids"].shape[1] :]


def _maps(model: Any, inputs: dict[str, Any], said: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
    """`(n, layers, rows, columns)` float64: attention to the picture by which each token of an answer was chosen."""
    base: Any = base_model(model)
    before = said[:, :-1]  # the last one chooses no other
    given = dict(inputs)
    for name, part in inputs.items():
        if isinstance(part, torch.Tensor) and part.shape == inputs["input_ids"].shape:
            more = {"input_ids": before, "attention_mask": torch.ones_like(before)}.get(name, torch.zeros_like(before))
            given[name] = torch.cat([part, more.to(part.dtype)], dim=1)
    span, first, inside = image_place(base, given, 0, 0)
    rows, columns = span.grid or (0, 0)
    found: list[torch.Tensor] = []

    def see(call: AttentionCall, own: torch.Tensor | None) -> None:
        visible, real = of_row(call, 0)
        heads = call.query.shape[1]
        total = torch.zeros(said.shape[1], rows * columns, dtype=torch.float64)
        for head in range(heads):
            weights = head_weights(call, own, head, 0, visible)[real[-said.shape[1] :]]
            total += weights[:, first : first + rows * columns].cpu().double() / heads
        found.append(total.view(-1, rows, columns))

    look(base, given, select_sites(base, layers=layers, modules=inside), see)
    return torch.stack(found, dim=1)


def _cut(image: Any, kept: torch.Tensor, box: tuple[int, int, int, int]) -> Any:
    """What was kept, on black, enlarged until it is as wide and as high as the picture."""
    from PIL import Image

    masked = Image.fromarray(np.asarray(image) * kept.numpy()[..., None].astype(np.uint8)).crop(box)
    scale = max(image.width / masked.width, image.height / masked.height)
    return masked.resize((int(masked.width * scale), int(masked.height * scale)), Image.Resampling.LANCZOS)
