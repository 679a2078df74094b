"""Masking retrieval heads from the prompt's last token on, against as many others: the central figure of 2404.15574."""

import math
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from patchattn.calibration.retrieval import needle_trials
from patchattn.core.kv_caches import cache_argument
from patchattn.evaluation.report.report import markdown_table

from .common import MASKED, Job, Row, Setup, paired, patched, top_and_random, verdict

NAME, STAGE = "masking", 1
WINDOW, SCORED = 1024, 256  # tokens of a text, and how many of them, the last ones, are scored under masking


def jobs(setup: Setup) -> list[Job]:
    how = {"lengths": list(setup.lengths), "samples": setup.samples, "values": "numbers", "data": str(setup.text)}
    trials = needle_trials(setup.tokenizer, **how, seed=1)  # not the texts that heads were found on
    needles: list[Job] = []
    for number in range(setup.samples):
        for place, length in enumerate(setup.lengths):
            trial = trials[place * setup.samples + number]
            seed = (2, length, number)
            needles.append(
                (f"needle/{length}/{number}", lambda t=trial, s=seed: {"found": _row(setup, t.tokens, t.answer, s)})
            )
    ids = setup.tokenizer(setup.text.read_text("utf-8"), add_special_tokens=False)["input_ids"]
    texts: list[Job] = []
    for number in range(min(setup.samples, len(ids) // WINDOW)):
        part = ids[number * WINDOW : (number + 1) * WINDOW]
        seed = (3, number)
        texts.append((f"text/{number}", lambda p=part, s=seed: {"found": _row(setup, p, SCORED, s)}))
    return [job for job in chain.from_iterable(zip_longest(needles[::2], needles[1::2], texts)) if job is not None]


@torch.inference_mode()
def _row(setup: Setup, tokens: list[int], answer: int, seed: tuple[int, ...]) -> Row:
    """Of every setting whether all tokens of an answer are the most likely ones, and their mean loss in nats.

    That they are is to say that greedy decoding writes the answer.
    """
    model: Any = setup.model
    ids = torch.tensor([tokens], device=model.device)
    before = ids.shape[1] - answer - 1  # all of the prompt but its last token is seen unmasked, once
    cache = DynamicCache(config=model.config)
    model(ids[:, :before], **cache_argument(model, cache), logits_to_keep=1)

    def score() -> list[float]:
        logits = model(ids[:, before:-1], **cache_argument(model, cache)).logits[0].double()
        cache.crop(-answer)
        right = logits.argmax(-1) == ids[0, before + 1 :]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, before + 1 :])
        return [float(right.all()), round(float(loss), 5)]

    found = {"dense": score()}
    for name, heads in top_and_random(setup, seed).items():
        with patched(model, "heads", heads=heads, edit="query"):
            found[name] = score()
    return found


def section(setup: Setup, pictures: Path | None) -> list[str]:
    rows = setup.rows(NAME)
    needles = [row["found"] for key, row in rows.items() if key.startswith("needle/")]
    texts = [row["found"] for key, row in rows.items() if key.startswith("text/")]
    lines = ["## Masking them", ""]
    if not needles or not texts:
        return [*lines, "Not measured yet."]
    lines += [
        f"{len(needles)} prompts with a needle of seven digits, of {' and '.join(map(str, setup.lengths))} tokens, "
        f"other ones than heads were found on; {len(texts)} texts of {WINDOW} tokens, of which the last {SCORED} are "
        "scored. Queries of the masked heads are zero from the prompt's last token on; before it nothing is masked. "
        f"Random heads are drawn anew for each prompt, outside the {max(MASKED)} best. An answer is right if greedy "
        "decoding writes it. Differences are of pairs, to the dense model, with their standard errors.",
        "",
    ]
    table = []
    for name in needles[0]:
        right, loss, text = (
            ([100 * row[name][0] for row in needles], [100 * row["dense"][0] for row in needles]),
            ([row[name][1] for row in needles], [row["dense"][1] for row in needles]),
            ([row[name][1] for row in texts], [row["dense"][1] for row in texts]),
        )
        cells = [name, f"{_mean(right[0]):.0f}", _signed(right, 0), f"{_mean(loss[0]):.2f}", _signed(loss, 2)]
        table.append([*cells, f"{math.exp(_mean(text[0])):.2f}", _signed(text, 3)])
    head = ["masked", "right, %", "difference", "loss, nats", "difference", "perplexity", "loss, difference"]
    lines += [*markdown_table(head, table, texts=1), ""]
    for count in MASKED:
        top, other = f"top {count}", f"random {count}"
        right = paired([100 * row[top][0] for row in needles], [100 * row[other][0] for row in needles])
        loss = paired([row[top][1] for row in needles], [row[other][1] for row in needles])
        text = paired([row[top][1] for row in texts], [row[other][1] for row in texts])
        lines += [
            verdict(
                f"Without the {top} heads fewer needles are found than without {other}", *right, "points", wants=-1
            ),
            verdict(f"Needles are less likely without the {top} than without {other}", *loss, "nats a token", wants=1),
            verdict(f"Texts are less likely, likewise ({top}, {other})", *text, "nats a token", wants=1),
        ]
    return lines


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _signed(pair: tuple[list[float], list[float]], digits: int) -> str:
    difference, error = paired(*pair)
    return f"{difference:+.{digits}f} ± {error:.{digits}f}"
