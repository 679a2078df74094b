"""Codes of heads (arXiv 2405.12522): do heads with codes of their own make up the circuit of a task?"""

from pathlib import Path

import numpy as np
import torch

from patchattn.evaluation.report.report import markdown_table
from patchattn.inspection.head_codes import code_scores

from .common import Job, Place, Row, Setup, best, drawn, losses, paired, silent, table_of, verdict

NAME, STAGE = "codes", 2
PROMPTS, SEEDS = 10, 3  # prompts of each kind, and autoencoders
COUNTS = (10, 20)  # heads that are silenced
_NAMES = (
    *("Mary", "John", "Tom", "Anna", "James", "Paul", "Mark", "Sarah"),
    *("David", "Peter", "Emma", "Jack", "Alice", "Kate", "Robert", "Laura"),
)
_PLACES = ("store", "park", "school", "house", "garden", "office", "station", "market")
_THINGS = ("drink", "ball", "book", "ring", "bone", "snack", "kiss", "letter")


def sentence(seed: int) -> tuple[str, str, str, str]:
    """Indirect objects: with the task, without it (a third name gives), who gets it, and who gives."""
    draw = np.random.default_rng((13, seed))
    first, second, third = (str(name) for name in draw.choice(_NAMES, 3, replace=False))
    giver, getter = (first, second) if draw.integers(2) else (second, first)
    place, thing = draw.choice(_PLACES), draw.choice(_THINGS)
    start = f"When {first} and {second} went to the {place},"
    with_task, without = (f"{start} {who} gave a {thing} to" for who in (giver, third))
    return with_task, without, f" {getter}", f" {giver}"


def jobs(setup: Setup) -> list[Job]:
    return [
        *((f"heads/{seed}", lambda seed=seed: {"scores": _scores(setup, seed)}) for seed in range(SEEDS)),
        *((f"without/{n}", lambda n=n: _without(setup, n)) for n in range(setup.samples)),
    ]


def _ids(setup: Setup, text: str) -> list[int]:
    return setup.tokenizer(text, add_special_tokens=False)["input_ids"]


def _scores(setup: Setup, seed: int) -> list[list[float]]:
    some = [sentence(1000 + number) for number in range(PROMPTS)]
    batches = [[{"input_ids": torch.tensor([_ids(setup, each[place])])} for each in some] for place in (0, 1)]
    return table_of(code_scores(setup.model, *batches, seed=seed))


def _lists(setup: Setup, number: int) -> dict[str, list[Place]]:
    scores = _mean(setup)
    found: dict[str, list[Place]] = {"dense": []}
    for count in COUNTS:
        found[f"best {count}"] = best(scores, count)
        found[f"random {count}"] = drawn(scores.shape, set(best(scores, 2 * max(COUNTS))), count, (14, number))
    return found


def _mean(setup: Setup) -> np.ndarray:
    rows = setup.rows(NAME)
    return np.mean([rows[f"heads/{seed}"]["scores"] for seed in range(SEEDS)], axis=0)


def _without(setup: Setup, number: int) -> Row:
    """How many nats the name that gets it is more likely than the one that gives."""
    text, _, *names = sentence(number)
    found = {}
    for name, heads in _lists(setup, number).items():
        with silent(setup, heads):
            right, wrong = (float(losses(setup, _ids(setup, text + who))[-1]) for who in names)
        found[name] = round(wrong - right, 4)
    return {"found": found}


def section(setup: Setup, pictures: Path | None) -> list[str]:
    rows = setup.rows(NAME)
    found = [row["found"] for key, row in rows.items() if key.startswith("without/")]
    lines = ["## Codes of heads", ""]
    if not found:
        return [*lines, "Not measured yet."]
    scores = _mean(setup)
    names = ", ".join(f"{layer}-{head}" for layer, head in best(scores, 5))
    tops = [set(best(rows[f"heads/{seed}"]["scores"], COUNTS[0])) for seed in range(SEEDS)]
    shared = np.mean([len(a & b) for at, a in enumerate(tops) for b in tops[at + 1 :]])
    lines += [
        f"The task is to say who gets something: *{sentence(0)[0]}*; without it a third name gives. Codes are of "
        f"{PROMPTS} prompts of each kind and the mean score is of {SEEDS} autoencoders. On {len(found)} other prompts "
        "the outputs of the best heads are zero at every token, or those of as many random ones, drawn anew for each "
        f"prompt, outside the {2 * max(COUNTS)} best; told is by how many nats the right name is more likely than the "
        "other.",
        "",
        f"- The best heads are {names}; {int((scores >= 0.9).sum())} of {scores.size} score 0.9 or more. The "
        f"{COUNTS[0]} best of two autoencoders share {shared:.1f} heads, by chance {COUNTS[0] ** 2 / scores.size:.1f}.",
        "",
    ]
    table = []
    for name in found[0]:
        pair = paired([row[name] for row in found], [row["dense"] for row in found])
        values = [row[name] for row in found]
        cells = ["" if name == "dense" else f"{pair[0]:+.2f} ± {pair[1]:.2f}"]
        right = 100 * sum(value > 0 for value in values) / len(values)
        table.append([{"dense": "none"}.get(name, name), f"{right:.0f}", f"{np.mean(values):.2f}", *cells])
    head = ["silent heads", "right name ahead, %", "by nats", "difference"]
    lines += [*markdown_table(head, table, texts=1), ""]
    return [
        *lines,
        *(
            verdict(
                f"Without the best {count} heads the right name is less ahead than without random {count}",
                *paired([row[f"best {count}"] for row in found], [row[f"random {count}"] for row in found]),
                "nats",
                wants=-1,
            )
            for count in COUNTS
        ),
    ]
