"""SmolLM2 beyond its 8,192 tokens: a text of 12,288, and a number that stands near its beginning."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from heads_parts.common import Job, verdict
from paired_rows import Row, paired

from .common import Setup, mean, patched, scored, signed, table

NAME, STAGE = "far", 2
LENGTH, SCORED, PROMPTS = 12288, 256, 2
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "self_extend": {"self_extend": {"group": 4, "window": 2048}},
}


def jobs(setup: Setup) -> list[Job]:
    if setup.model is None:
        return []
    return [
        (f"{number}/{setting}", lambda n=number, s=setting: _row(setup, n, s))
        for number in range(PROMPTS)
        for setting in SETTINGS
    ]


@torch.inference_mode()
def _row(setup: Setup, number: int, setting: str) -> Row:
    """Loss of the last tokens of a text; whether a number that was said in it comes, and its loss."""
    model, tokenizer = setup.smol
    draw = np.random.default_rng((5, number))
    said = f" The secret number is {draw.integers(10**6, 10**7)}."
    asked, needle = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("\n\n" + said[1:], said))
    text = tokenizer(setup.text.read_text("utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    filler = text[number * LENGTH :][: LENGTH - len(asked) - len(needle)]
    place = len(filler) // 10
    ids = torch.tensor([[*filler[:place], *needle, *filler[place:], *asked]])
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)  # its frequencies stay as they are
    with patched(half, SETTINGS[setting]):
        logits = half(ids, logits_to_keep=SCORED + len(asked) + 1).logits[0, :-1]
    right, loss = scored(logits, ids[0, -len(logits) :])
    answer = len(tokenizer(said.rpartition(" ")[2], add_special_tokens=False)["input_ids"])
    found = [loss[:SCORED].mean(), right[-answer:-1].all(), loss[-answer:-1].mean()]  # but the full stop
    return {"found": [round(float(value), 5) for value in found]}


def section(setup: Setup, pictures: Path | None) -> list[str]:
    rows = setup.rows(NAME)
    lines = ["## SmolLM2 at 12,288 tokens", ""]
    numbers = [n for n in range(PROMPTS) if all(f"{n}/{setting}" in rows for setting in SETTINGS)]
    if not numbers:
        return [*lines, "Not measured yet."]
    found = {setting: [rows[f"{n}/{setting}"]["found"] for n in numbers] for setting in SETTINGS}
    lines += [
        f"{len(numbers)} texts in bfloat16, of a model that was trained to 8,192 tokens. A number of seven digits is "
        f"said a tenth of the way in and begun again at the end. The loss is that of the {SCORED} tokens before that. "
        "Self-Extend has groups of 4 and a window of 2,048.",
        "",
    ]
    cells = [
        [setting, *(f"{mean([row[place] for row in each]):.{digits}f}" for place, digits in ((0, 3), (1, 2), (2, 2)))]
        for setting, each in found.items()
    ]
    lines += table(["", "loss of the text, nats", "number right, share", "its loss, nats"], cells)
    pairs = [([row[place] for row in found["self_extend"]], [row[place] for row in found["plain"]]) for place in (0, 2)]
    if len(numbers) < 2:
        return [*lines, "Too few texts to claim anything.", ""]
    return [
        *lines,
        f"Differences: {signed(*pairs[0], 3)} and {signed(*pairs[1], 2)} nats.",
        "",
        verdict("Self-Extend reads texts beyond the trained length better", *paired(*pairs[0]), "nats", wants=-1),
        verdict("Self-Extend finds what stands farther than that", *paired(*pairs[1]), "nats a token", wants=-1),
        "",
    ]
