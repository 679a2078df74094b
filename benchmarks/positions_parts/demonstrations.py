"""SmolLM2 on questions behind many demonstrations, read in order, or as FocusICL does: in batches, without what is
trivial in them."""

from typing import Any

import numpy as np
import torch
from heads_parts.common import Job, verdict
from paired_rows import Row, paired

from patchattn.evaluation.tasks.glue import load_glue
from patchattn.positions.marking import mark_segments

from .common import Setup, answers_table, mean, patched, scored
from .documents import found_once

NAME, STAGE = "demonstrations", 1
COUNT, PROMPTS = 32, 30
LABELS = ("negative", "positive")
BEFORE = "Say of each movie review whether it is positive or negative.\n\n"
REVIEW = "Review: {text}\nSentiment:"
# of `focus_icl`; the paper searches p and B by the perplexity of demonstrations
SETTINGS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "p = 0.1": {"trivial": 0.1},
    "B = 8": {"trivial": 0.0, "batch": 8},
    "p = 0.1, B = 8": {"trivial": 0.1, "batch": 8},
}


def jobs(setup: Setup) -> list[Job]:
    if setup.model is None or setup.glue is None:
        return []
    return [(str(number), lambda n=number: _row(setup, n)) for number in range(PROMPTS)]


def _reviews(setup: Setup, number: int) -> tuple[list[tuple[str, int]], tuple[str, int]]:
    """Demonstrations, half of them of each label, and the one that is asked about."""
    if "sst2" not in setup.loaded:
        setup.loaded["sst2"] = load_glue("sst2", setup.glue)
    training, validation = setup.loaded["sst2"]
    draw = np.random.default_rng((7, number))
    labels, shown = np.asarray(training["label"]), []
    for label in (0, 1):
        shown += [int(place) for place in draw.choice(np.flatnonzero(labels == label), COUNT // 2, replace=False)]
    order = [shown[place] for place in draw.permutation(COUNT)]
    asked = validation[int(draw.integers(len(validation)))]
    demonstrations = [(training[place]["sentence1"].strip(), int(labels[place])) for place in order]
    return demonstrations, (asked["sentence1"].strip(), int(asked["label"]))


@torch.inference_mode()
def _row(setup: Setup, number: int) -> Row:
    """Of every setting whether the true label is likelier than the other one, and its loss; and the prompt's tokens."""
    model, tokenizer = setup.smol
    rotary, _ = found_once(setup)
    shown, (text, label) = _reviews(setup, number)
    parts = [
        ("prefix", BEFORE),
        *(("demonstration", f"{REVIEW.format(text=each)} {LABELS[of_it]}\n\n") for each, of_it in shown),
        (None, REVIEW.format(text=text)),
    ]
    marked = mark_segments(tokenizer, parts, add_special_tokens=False)
    answers = [tokenizer(f" {name}", add_special_tokens=False)["input_ids"][0] for name in LABELS]
    ids, found = torch.tensor([marked.input_ids]), {}
    for setting, given in SETTINGS.items():
        how = {} if given is None else {"focus_icl": {**given, "spans": marked.spans, "rotary": rotary}}
        with patched(model, how):
            logits = model(ids, logits_to_keep=1).logits[0, -1:]
        _, loss = scored(logits, torch.tensor(answers[label : label + 1]))
        is_right = logits[0, answers[label]] > logits[0, answers[1 - label]]
        found[setting] = [float(is_right), round(loss.item(), 5)]
    return {"found": found, "tokens": len(marked.input_ids)}


# measure, its place in a row, factor and unit, and the sign that it is to have
_CLAIMED = (("right answers", 0, 100.0, "points", 1), ("the loss", 1, 1.0, "nats", -1))


def section(setup: Setup, pictures: object) -> list[str]:
    rows = list(setup.rows(NAME).values())
    lines = ["## Many demonstrations", ""]
    if not rows:
        return [*lines, "Not measured yet."]
    found = [row["found"] for row in rows]
    tokens = mean([row["tokens"] for row in rows])
    lines += [
        f"SmolLM2-135M-Instruct, {len(rows)} reviews of SST-2's validation set, each behind {COUNT} of its training "
        f"set with their labels, half of them positive: {tokens:.0f} tokens in the mean. An "
        "answer is right if the true label is likelier than the other. FocusICL here is a reconstruction ([what is "
        "known of it](../variants/focus_icl.md)); p is the share of the demonstrations' tokens that is hidden, B how "
        "many demonstrations are read together. Differences are of pairs, to plain.",
        "",
    ]
    claims = []
    for setting in [name for name in SETTINGS if name != "plain"]:
        for how, place, factor, unit, wants in _CLAIMED:
            own, plain = ([factor * row[name][place] for row in found] for name in (setting, "plain"))
            claim = f"FocusICL, {setting}, is better than plain demonstrations, by {how}"
            claims.append(verdict(claim, *paired(own, plain), unit, wants=wants))
    return [*lines, *answers_table(SETTINGS, found), *claims, ""]
