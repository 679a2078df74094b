"""Positional heads, and heads that look at rare tokens (arXiv 2403.19851): how many, and what is lost without them."""

from pathlib import Path

import numpy as np
import torch

from patchattn.evaluation.report.report import markdown_table
from patchattn.inspection.head_roles import position_scores, rarity_scores

from .common import Job, Place, Row, Setup, best, drawn, losses, paired, silent, table_of, verdict, windows

NAME, STAGE = "places", 2
WINDOW, COPIED = 128, 48  # tokens of a text, and of what is drawn and then repeated
COUNT = 10  # heads that are silenced
KINDS = {"before": "the token before", "itself": "the token itself", "rare": "rare tokens"}


def jobs(setup: Setup) -> list[Job]:
    texts = windows(setup, WINDOW)[: setup.samples]
    found, scored = texts[: len(texts) // 2], texts[len(texts) // 2 :]
    return [
        *((f"heads/{n}", lambda text=text: _scores(setup, text)) for n, text in enumerate(found)),
        *((f"without/{n}", lambda text=text, n=n: _without(setup, text, n)) for n, text in enumerate(scored)),
    ]


def _scores(setup: Setup, text: list[int]) -> Row:
    batch = {"input_ids": torch.tensor([text])}
    counts = np.bincount(setup.ids, minlength=len(setup.tokenizer)) + 1.0
    before, itself = (position_scores(setup.model, [batch], offset=offset) for offset in (-1, 0))
    return {
        "before": table_of(before, 3),
        "itself": table_of(itself, 3),
        "rare": table_of(rarity_scores(setup.model, [batch], counts=counts.tolist()), 3),
        "chance": before.settings["chance"],
    }


def halves(setup: Setup, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """`(texts, layers, heads)` scores: those that heads are chosen by, and those of the other texts."""
    rows = setup.rows(NAME)
    keys = sorted((key for key in rows if key.startswith("heads/")), key=lambda key: int(key.split("/")[1]))
    every = np.array([rows[key][kind] for key in keys])
    return every[: len(every) // 2], every[len(every) // 2 :]


def chosen(setup: Setup, number: int) -> dict[str, list[Place]]:
    """Heads that are silenced, by name; random ones are drawn anew for each text, from outside twice as many."""
    lists: dict[str, list[Place]] = {"dense": []}
    ranked: set[Place] = set()
    for kind in ("before", "rare"):
        scores = halves(setup, kind)[0].mean(0)
        lists[kind] = best(scores, COUNT)
        ranked |= set(best(scores, 2 * COUNT))
    lists["random"] = drawn(scores.shape, ranked, COUNT, (7, number))
    return lists


def _without(setup: Setup, text: list[int], number: int) -> Row:
    draw = np.random.default_rng((8, number)).integers(100, len(setup.tokenizer), COPIED).tolist()
    found = {}
    for name, heads in chosen(setup, number).items():
        with silent(setup, heads):
            plain, copied = losses(setup, text), losses(setup, draw + draw)[COPIED:]
        found[name] = [round(float(plain.mean()), 4), round(float(copied.mean()), 4)]
    return {"found": found}


def section(setup: Setup, pictures: Path | None) -> list[str]:
    rows = setup.rows(NAME)
    found = [row["found"] for key, row in rows.items() if key.startswith("without/")]
    lines = ["## Heads that look at one place, or at rare tokens", ""]
    if not found:
        return [*lines, "Not measured yet."]
    count = len(rows) - len(found)
    chance = float(np.mean([row["chance"] for key, row in rows.items() if key.startswith("heads/")]))
    lines += [
        f"{count} texts of {WINDOW} tokens. A head's score is the share of tokens whose largest weight is on the token "
        f"before, or on itself (by chance {chance:.3f}), or Spearman's correlation of what a token receives with how "
        "rare it is in the whole file. The ten best heads are those of the first half of the texts, their score is of "
        "the other half.",
        "",
    ]
    table, told = [], {}
    for kind, name in KINDS.items():
        first, other = halves(setup, kind)
        top = best(first.mean(0), COUNT)
        each = np.array([other[:, layer, head] for layer, head in top]).mean(0)
        told[kind] = paired(each.tolist(), other.mean((1, 2)).tolist())
        error = each.std(ddof=1) / len(each) ** 0.5 if len(each) > 1 else float("nan")
        above = int((np.concatenate([first, other]).mean(0) > 0.5).sum())
        names = ", ".join(f"{layer}-{head}" for layer, head in top[:5])
        table.append([name, names, f"{each.mean():.2f} ± {error:.2f}", f"{other.mean():.2f}", f"{above}"])
    head = ["look at", "the best five", "score of the best ten", "of all heads", "heads above 0.5"]
    lines += [*markdown_table(head, table, texts=2), ""]
    lines += [
        f"Then {len(found)} other texts, and {COPIED} tokens drawn at random and written twice, of which the second "
        f"half is scored. The outputs of {COUNT} heads are zero at every token; random ones are drawn anew for each "
        f"text, outside the {2 * COUNT} best. Differences are of pairs, to the model as it is, in nats a token.",
        "",
    ]
    table = []
    for name in found[0]:
        cells = [{"dense": "none", "random": "random"}.get(name, KINDS.get(name, name))]
        for place in (0, 1):
            pair = paired([row[name][place] for row in found], [row["dense"][place] for row in found])
            mean = sum(row[name][place] for row in found) / len(found)
            cells += [f"{mean:.3f}", "" if name == "dense" else f"{pair[0]:+.3f} ± {pair[1]:.3f}"]
        table.append(cells)
    heads = ["silent heads look at", "loss of texts", "difference", "loss of a copy", "difference"]
    lines += [*markdown_table(heads, table, texts=1), ""]
    text, copy = (
        paired([row["before"][place] for row in found], [row["random"][place] for row in found]) for place in (0, 1)
    )
    more = paired(
        [row["before"][1] - row["random"][1] for row in found], [row["before"][0] - row["random"][0] for row in found]
    )
    rare = paired([row["rare"][0] for row in found], [row["random"][0] for row in found])
    lines += [
        verdict("Some heads look at the token before, in other texts too", *told["before"], "of score", wants=1),
        verdict("Some heads look at rare tokens, in other texts too", *told["rare"], "of correlation", wants=1),
        verdict(
            "A copy is lost without heads that look at the token before, more than without random ones",
            *copy,
            "nats a token",
            wants=1,
        ),
        verdict("Texts are less likely, likewise", *text, "nats a token", wants=1),
        verdict("They serve copies more than texts", *more, "nats a token", wants=1),
        verdict(
            "Texts are less likely without heads that look at rare tokens than without random ones",
            *rare,
            "nats a token",
            wants=1,
        ),
    ]
    return lines
