"""Texts longer than those of training: loss of the last tokens, and recall of what stands far before them."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from heads_parts.common import Job, verdict
from paired_rows import Row, paired
from transformers import AutoModelForCausalLM, AutoTokenizer

import patchattn

from . import small
from .common import Setup, mean, patched, rotating, scored, signed, table

NAME, STAGE = "length", 1
LENGTHS, TRAINED = (512, 1024, 2048, 4096), 512
SCORED, COPIED = 256, 64  # last tokens whose loss counts; tokens that come again at the end of a text of stories260K
BINS = (0, 256, 512, 1024, 2048, 4096)
FACTOR = 8.0
# Rotary parameters, and variants with their settings; the base of "ntk" is made of the head's dimensions.
SETTINGS: dict[str, tuple[dict[str, Any] | None, dict[str, dict[str, Any]]]] = {
    "plain": (None, {}),
    "interpolation": ({"rope_type": "linear", "factor": FACTOR}, {}),
    "ntk": ({}, {}),
    "yarn": ({"rope_type": "yarn", "factor": FACTOR, "original_max_position_embeddings": TRAINED}, {}),
    "self_extend": (None, {"self_extend": {"group": 16, "window": 128}}),
    "longheads": (None, {"longheads": {"window": TRAINED, "chunk": 64}}),
    "logn": (None, {"logn": {"train_length": TRAINED}}),
    "ssmax": (None, {}),
}
CLAIMED = ("self_extend", "longheads", "logn", "ssmax")
DRAWN = ("plain", "interpolation", "yarn", "self_extend", "longheads", "logn")


def names(setup: Setup) -> list[str]:
    """Models that are measured."""
    found = [] if setup.stories is None else ["stories260K"]
    return [*found, *(f"small-{seed}" for seed in setup.seeds if setup.training is not None)]


def settings(model: str) -> list[str]:
    """What is measured of a model; LongHeads where it is there."""
    known = [name for name in SETTINGS if name != "longheads" or "longheads" in patchattn.list_variants()]
    return [name for name in known if name != "ssmax" or model.startswith("small")]


def jobs(setup: Setup) -> list[Job]:
    return [
        (f"{model}/{length}/{number}", lambda m=model, t=length, n=number: {"found": _row(setup, m, t, n)})
        for number in range(setup.samples)
        for model in names(setup)
        for length in LENGTHS
    ]


def _loaded(setup: Setup, name: str) -> tuple[Any, Any, np.ndarray]:
    """A model, its twin with SSMax if it has one, and the tokens to measure on."""
    if name not in setup.loaded:
        text = setup.text.read_text("utf-8")
        if name == "stories260K":
            tokenizer = AutoTokenizer.from_pretrained(setup.stories)
            model = AutoModelForCausalLM.from_pretrained(setup.stories, dtype=torch.float32).eval()
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            setup.loaded[name] = model, None, np.array(ids)
        else:
            seed, training = int(name.rpartition("-")[2]), setup.training
            if training is None:
                raise ValueError("The small model needs a text to be trained on.")
            pair = [small.trained(setup.models, training, seed, scaled=scaled) for scaled in (False, True)]
            setup.loaded[name] = (*pair, small.characters(text))
    return setup.loaded[name]


def _samples(name: str, text: np.ndarray, length: int, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A text that ends alike at every length, with what is recalled behind it; which tokens are the last ones of the
    text, and which are answers."""
    end, draw = (number + 1) * (max(LENGTHS) + SCORED), np.random.default_rng((4, number))
    if name != "stories260K":
        asked = 2 * small.FACTS
        start = end - (length - 3 * small.FACTS)
        row, is_answer = small.recall_row(text, length, draw, start, SCORED)
    else:
        asked = COPIED
        copied = text[-(number + 1) * COPIED :][:COPIED]
        row = np.concatenate([copied, text[end - (length - 2 * COPIED) : end], copied])
        is_answer = np.zeros(length, dtype=bool)
        is_answer[-COPIED + 8 :] = True  # by then it can be known what is copied
    is_last = np.zeros(length, dtype=bool)
    is_last[length - asked - SCORED : length - asked] = True
    return row, is_last, is_answer


def _row(setup: Setup, name: str, length: int, number: int) -> Row:
    """Of every setting: loss of the last tokens of the text, share of answers that are most likely, and their loss; and
    of the longest text the loss by position."""
    model, twin, text = _loaded(setup, name)  # which may train it
    tokens, is_last, is_answer = (torch.from_numpy(part) for part in _samples(name, text, length, number))
    is_text = (tokens < small.CHARACTERS) | (name == "stories260K")
    found: Row = {}
    for setting in settings(name):
        rope, variants = SETTINGS[setting]
        if setting == "ntk":
            width = model.config.head_dim
            rope = {"rope_theta": model.config.rope_parameters["rope_theta"] * FACTOR ** (width / (width - 2))}
        base = twin if setting == "ssmax" else model if rope is None else rotating(model, **rope)
        with patched(base, variants), torch.inference_mode():
            right, each = scored(base(tokens[None]).logits[0, :-1], tokens[1:])
        of_answers = right[is_answer[1:]].double(), each[is_answer[1:]]
        values = (each[is_last[1:]].mean(), *(part.mean() for part in of_answers))
        found[setting] = [round(value.item(), 5) for value in values]
        if length == max(LENGTHS):
            counted = is_text[1:] & ~is_answer[1:]
            bins = [(slice(start, end - 1)) for start, end in itertools.pairwise(BINS)]
            found[setting].append([round(each[place][counted[place]].mean().item(), 4) for place in bins])
    return found


def section(setup: Setup, pictures: Path | None) -> list[str]:
    rows = setup.rows(NAME)
    lines = ["## Texts longer than those of training", ""]
    if not rows:
        return [*lines, "Not measured yet."]
    lines += [
        f"Two models that were trained to {TRAINED} tokens: stories260K, on the text of `--text`, which is none of its "
        "stories; and a small Llama (2 layers, 64 wide, of characters), which `small.py` trains in a minute to read "
        f"and to recall. The loss is that of the last {SCORED} tokens of a text, the same ones at every length. An "
        f"answer is right if it is the most likely token: of the small model the values of {small.FACTS} keys, each "
        f"said by a token that stands anywhere before, of stories260K a passage of {COPIED} tokens that begins the row "
        "and comes again at its end. `interpolation`, `ntk` and `yarn` are settings of transformers with the factor "
        f"{FACTOR:g}, not trained further; Self-Extend has groups of 16 and a window of 128, LongHeads chunks of 64. "
        "SSMax is a twin of the small model that was trained with it. Differences are of pairs, to plain, with their "
        "standard errors.",
        "",
    ]
    groups = {"stories260K": ["stories260K"], "The small Llama": [f"small-{seed}" for seed in setup.seeds]}
    for title, models in groups.items():
        found = {
            length: [row["found"] for key, row in rows.items() if key.startswith(_starts(models, length))]
            for length in LENGTHS
        }
        if not all(found.values()):
            lines += [f"### {title}", "", "Not measured at every length yet.", ""]
            continue
        counts = ", ".join(f"{len(found[length])} at {length}" for length in LENGTHS)
        lines += [f"### {title}", "", f"Texts: {counts} tokens.", "", "Loss of the last tokens, nats:", ""]
        lines += _table(found, 0, 3, 1.0)
        lines += ["Right answers, %:", ""]
        lines += _table(found, 1, 0, 100.0)
        lines += _claims(title, found)
    if pictures is not None and any(key.split("/")[1] == str(max(LENGTHS)) for key in rows):
        _draw(rows, groups, pictures / "positions_length.png")
        lines += ["", "![Loss by position in texts of 4096 tokens](positions_length.png)"]
    return lines


def _starts(models: list[str], length: int) -> tuple[str, ...]:
    return tuple(f"{model}/{length}/" for model in models)


def _of(found: list[Row], setting: str, place: int, factor: float) -> tuple[list[float], list[float]]:
    """What a setting has in the rows that it is in, and what plain has in the same."""
    pairs = [(row[setting][place], row["plain"][place]) for row in found if setting in row]
    return [factor * own for own, _ in pairs], [factor * plain for _, plain in pairs]


def _table(found: dict[int, list[Row]], place: int, digits: int, factor: float) -> list[str]:
    cells = []
    for setting in SETTINGS:
        pairs = {length: _of(found[length], setting, place, factor) for length in LENGTHS}
        if not all(own for own, _ in pairs.values()):
            continue
        line = [setting]
        for own, plain in pairs.values():
            line += [
                f"{mean(own):.{max(digits, 1)}f}",
                "" if setting == "plain" else signed(own, plain, max(digits, 1)),
            ]
        cells.append(line)
    head = ["", *(text for length in LENGTHS for text in (str(length), "difference"))]
    return table(head, cells)


def _claims(title: str, found: dict[int, list[Row]]) -> list[str]:
    """What the papers of variants claim of long texts; the other settings are in the tables."""
    lines, longest = [], max(LENGTHS)
    for setting in CLAIMED:
        if not _of(found[longest], setting, 0, 1.0)[0]:
            continue
        loss = paired(*_of(found[longest], setting, 0, 1.0))
        right = paired(*_of(found[longest], setting, 1, 100.0))
        lines += [
            verdict(f"{title}, {longest} tokens, {setting}: lower loss than plain", *loss, "nats a token", wants=-1),
            verdict(f"{title}, {longest} tokens, {setting}: more right answers", *right, "points", wants=1),
        ]
    return [*lines, ""]


def _draw(rows: dict[str, Row], groups: dict[str, list[str]], path: Path) -> None:
    from matplotlib.figure import Figure

    from patchattn.plotting.style import GREY, SERIES

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, len(groups))
    middle = [(start + end) / 2 for start, end in itertools.pairwise(BINS)]
    for axis, (title, models) in zip(axes, groups.items(), strict=True):
        found = [row["found"] for key, row in rows.items() if key.startswith(_starts(models, max(LENGTHS)))]
        for setting, (colour, marker) in zip(DRAWN, SERIES, strict=True):
            bins = [row[setting][3] for row in found if setting in row]
            if bins:
                axis.plot(middle, np.mean(bins, axis=0), color=colour, marker=marker, label=setting)
        axis.axvline(TRAINED, color=GREY, linestyle=":")
        axis.set(title=title, xlabel="position", xscale="log")
        axis.set_xticks(BINS[1:], [str(each) for each in BINS[1:]])
        axis.minorticks_off()
    axes[0].set_ylabel("loss, nats")
    axes[-1].legend(fontsize="small")
    figure.savefig(path, dpi=120)
