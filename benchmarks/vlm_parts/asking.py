"""What is asked of pictures, and what is kept of the answers."""

from typing import Any

import torch

from patchattn.evaluation.tasks import collages
from patchattn.evaluation.tasks.company import KINDS
from patchattn.inspection.carve import carve
from patchattn.inspection.vl_sam import image_flow

PICTURES_SEED = 2_000_003  # no seed that the recipe trains or evaluates on
SAID = ("Yes", "No")
CAPTION_TOKENS = 32
FARTHEST = 20.0  # of a margin in nats: a method that forbids an answer leaves none


def prompt(processor: Any, text: str) -> str:
    """A request about one picture in the processor's template."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    found: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return found


def given(model: Any, processor: Any, pictures: list[Any], texts: list[str]) -> Any:
    """What `generate` takes, padded on the left."""
    inputs = processor(
        images=pictures, text=[prompt(processor, text) for text in texts], padding=True, return_tensors="pt"
    )
    return inputs.to(model.device, model.dtype)


def asked(scene: collages.Scene) -> list[str]:
    """A class that is there, and one that is not of each of POPE's kinds."""
    return [scene.present(), *(scene.absent(kind) for kind in KINDS)]


def answers(model: Any, processor: Any, scenes: list[collages.Scene], pictures: list[Any]) -> list[dict[str, Any]]:
    """A row per picture: `said`, a letter for each question (`?` for another word than yes and no), `margin`, by how
    many nats yes is likelier than no, and `caption`."""
    names = [asked(scene) for scene in scenes]
    count = len(names[0])
    texts = [collages.question(name) for each in names for name in each]
    repeated = [picture for picture in pictures for _ in range(count)]
    with torch.inference_mode():
        found = model.generate(
            **given(model, processor, repeated, texts),
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        asks = given(model, processor, pictures, [collages.CAPTION_REQUEST] * len(pictures))
        written = model.generate(**asks, max_new_tokens=CAPTION_TOKENS, do_sample=False)
    yes, no = (processor.tokenizer.encode(word, add_special_tokens=False)[0] for word in SAID)
    logits = found.logits[0].float()
    margins = (logits[:, yes] - logits[:, no]).nan_to_num(0.0).clamp(-FARTHEST, FARTHEST).view(-1, count)
    letters = [{yes: "Y", no: "N"}.get(token, "?") for token in found.sequences[:, -1].tolist()]
    captions = processor.batch_decode(written[:, asks["input_ids"].shape[1] :], skip_special_tokens=True)
    return [
        {
            "said": "".join(letters[row * count : (row + 1) * count]),
            "margin": [round(value, 2) for value in margins[row].tolist()],
            "caption": caption.strip(),
        }
        for row, caption in enumerate(captions)
    ]


def looks(model: Any, processor: Any, scene: collages.Scene, picture: Any) -> dict[str, Any]:
    """Where the model looks when it is asked after the first and after the last object of a picture.

    Returns:
        `flow`, `carve`: for each of the two questions, shares of VL-SAM's flow and of the pixels that CARVE keeps, in
        the quarter of the first and in that of the last object. `before`, `after`: whether CARVE's two answers are yes.
    """
    row: dict[str, Any] = {"flow": [], "carve": [], "before": [], "after": []}
    for name in (scene.objects[0], scene.objects[-1]):
        text = collages.question(name)
        flow = image_flow(model, given(model, processor, [picture], [text])).grid
        found = carve(model, processor, picture, text, suffix="", steps=2)
        for key, grid in (("flow", flow), ("carve", found.kept.double())):
            row[key].append([round(quarter(grid, cell), 4) for cell in (scene.cells[0], scene.cells[-1])])
        row["before"].append(found.before.startswith(SAID[0]))
        row["after"].append(found.answer.startswith(SAID[0]))
    return row


def quarter(grid: torch.Tensor, cell: int) -> float:
    """Share of a map's sum that lies in a quarter of a picture."""
    rows, columns = (size // collages.CELLS for size in grid.shape)
    top, left = cell // collages.CELLS * rows, cell % collages.CELLS * columns
    return float(grid[top : top + rows, left : left + columns].sum() / grid.sum())
