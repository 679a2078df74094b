"""Memorised passages (arXiv 2403.19851): where their gradients are, and what heads of rare tokens are to them."""

from pathlib import Path

import numpy as np
import torch

from patchattn.evaluation.report.report import markdown_table
from patchattn.inspection.head_roles import gradient_scores

from . import places
from .common import Job, Row, Setup, losses, silent, table_of, verdict, windows
from .passages import PASSAGES

NAME, STAGE = "memory", 3
TOKENS = 64
KNOWN = 0.5  # share of the second half's tokens that the model expects most, of what it knows by heart


def jobs(setup: Setup) -> list[Job]:
    encoded = {
        name: setup.tokenizer(text, add_special_tokens=False)["input_ids"][:TOKENS] for name, text in PASSAGES.items()
    }
    every, count = windows(setup, TOKENS), max(1, setup.samples // 2)
    texts = every[:: max(1, len(every) // count)][:count]
    encoded |= {f"text {number}": text for number, text in enumerate(texts)}
    return [(name, lambda ids=ids, n=n: _row(setup, ids, n)) for n, (name, ids) in enumerate(encoded.items())]


def _row(setup: Setup, ids: list[int], number: int) -> Row:
    half = len(ids) // 2
    with torch.inference_mode():
        logits = setup.model(torch.tensor([ids])).logits[0, half - 1 : -1]
    right = float((logits.argmax(-1) == torch.tensor(ids[half:])).double().mean())
    sizes = np.array(table_of(gradient_scores(setup.model, [{"input_ids": torch.tensor([ids])}]), 6)).sum(1)
    lists = {name: heads for name, heads in places.chosen(setup, 100 + number).items() if name != "before"}
    found = {}
    for name, heads in lists.items():
        with silent(setup, heads):
            found[name] = round(float(losses(setup, ids)[half - 1 :].mean()), 4)
    return {"right": round(right, 4), "gradients": [round(float(size), 4) for size in sizes], "found": found}


def apart(some: list[float], others: list[float]) -> tuple[float, float]:
    """Difference of the means of two groups that are no pairs, and its standard error."""
    if min(len(some), len(others)) < 2:
        return float("nan"), float("nan")
    error = sum(np.var(each, ddof=1) / len(each) for each in (some, others)) ** 0.5
    return float(np.mean(some) - np.mean(others)), float(error)


def low_share(row: Row) -> float:
    """Share of the gradients' sizes that is in the lower half of the layers, in percent."""
    sizes = np.array(row["gradients"])
    return float(100 * sizes[: len(sizes) // 2].sum() / sizes.sum())


def section(setup: Setup, pictures: Path | None) -> list[str]:
    rows = setup.rows(NAME)
    names = sorted(name for name, row in rows.items() if name in PASSAGES and row["right"] >= KNOWN)
    known = [rows[name] for name in names]
    groups = {"known by heart": known, "other passages and texts": [row for row in rows.values() if row not in known]}
    lines = ["## Memorised passages", ""]
    if min(map(len, groups.values())) < 2:
        return [*lines, "Not measured yet."]
    quoted = sum(name in PASSAGES for name in rows)
    lines += [
        f"{quoted} passages that many texts quote, such as the Gettysburg Address, and {len(rows) - quoted} "
        f"texts of the file, of at most {TOKENS} tokens. A model knows one by heart here if it expects at least "
        f"{100 * KNOWN:.0f} % of the second half's tokens: {len(known)} ({', '.join(names)}). Gradients are of the "
        "loss, their sizes summed over the weights of each layer's heads. Silenced are the ten heads that look at rare "
        "tokens most, or as many random ones, as above; their price is in nats a token of the second half. The groups "
        "are no pairs: the standard error is that of the difference of two means.",
        "",
    ]
    table = []
    for name, group in groups.items():
        shares = [low_share(row) for row in group]
        costs = [[row["found"][kind] - row["found"]["dense"] for row in group] for kind in ("rare", "random")]
        cells = [
            f"{np.mean(each):{form}} ± {np.std(each, ddof=1) / len(each) ** 0.5:.{form[-2]}f}"
            for each, form in ((shares, ".1f"), (costs[0], "+.2f"), (costs[1], "+.2f"))
        ]
        table.append([name, str(len(group)), f"{np.mean([row['found']['dense'] for row in group]):.2f}", *cells])
    head = [
        "",
        "number",
        "loss",
        "gradients in the lower half of the layers, %",
        "without heads of rare tokens",
        "without random heads",
    ]
    lines += [*markdown_table(head, table, texts=1), ""]

    def each(what: str) -> list[list[float]]:
        return [[row["found"][what] - row["found"]["random"] for row in group] for group in groups.values()]

    lines += [
        verdict(
            "Gradients of what is known by heart lie in lower layers",
            *apart(*([low_share(row) for row in group] for group in groups.values())),
            "points",
            wants=1,
        ),
        verdict(
            "What is known by heart loses more without heads of rare tokens, against random ones, than other texts",
            *apart(*each("rare")),
            "nats a token",
            wants=1,
        ),
    ]
    return lines
