"""MAPS (arXiv 2412.11965): do heads whose weights lead from a country to its capital do so in the model?"""

from pathlib import Path

import numpy as np

from patchattn.evaluation.report.report import markdown_table
from patchattn.inspection.head_functions import relation_scores

from .common import Job, Row, Setup, best, drawn, losses, paired, silent, table_of, verdict
from .facts import KINDS

NAME, STAGE = "maps", 2
COUNT = 10  # heads that are silenced
TOP = 10  # the second word must be among so many tokens
# what a word stands in, and pairs of words
_RELATIONS = {
    "capital": ("The capital of{} is", KINDS["capital"][2]),
    "plural": (
        "One{}, two",
        "cat:cats dog:dogs house:houses tree:trees car:cars book:books friend:friends river:rivers child:children "
        "man:men woman:women foot:feet mouse:mice city:cities country:countries story:stories box:boxes "
        "church:churches class:classes dish:dishes leaf:leaves wife:wives wolf:wolves knife:knives hero:heroes "
        "horse:horses bird:birds king:kings queen:queens road:roads ship:ships word:words person:people tooth:teeth",
    ),
}


def pairs(setup: Setup, relation: str) -> list[tuple[int, int]]:
    """Ids of the pairs whose words, with the blank in front of them, are single tokens; in an order that is drawn."""
    found = []
    for pair in _RELATIONS[relation][1].split():
        ids = [setup.tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in pair.split(":")]
        if all(len(each) == 1 for each in ids):
            found.append((ids[0][0], ids[1][0]))
    return [found[place] for place in np.random.default_rng(0).permutation(len(found))]


def halves(setup: Setup, relation: str) -> dict[str, list[tuple[int, int]]]:
    """Pairs that heads are found by, others, and those with each other's second word."""
    every = pairs(setup, relation)
    found, other = every[: len(every) // 2], every[len(every) // 2 :]
    targets = [target for _, target in other]
    wrong = [(source, target) for (source, _), target in zip(other, targets[1:] + targets[:1], strict=True)]
    return {"found": found, "other": other, "wrong": wrong}


def jobs(setup: Setup) -> list[Job]:
    listed: list[Job] = []
    for relation in _RELATIONS:
        split = halves(setup, relation)
        for name, some in split.items():
            if some:
                listed.append(
                    (
                        f"{relation}/{name}",
                        lambda s=some: {"scores": table_of(relation_scores(setup.model, s, top=TOP))},
                    )
                )
        for number, pair in enumerate(split["other"]):
            listed.append(
                (f"{relation}/without/{number}", lambda r=relation, p=pair, n=number: _without(setup, r, p, n))
            )
    return listed


def _without(setup: Setup, relation: str, pair: tuple[int, int], number: int) -> Row:
    """Loss of the second word in a sentence, whose prompt says three other pairs first."""
    before, behind = _RELATIONS[relation][0].split("{}")
    before, behind, stop = (
        setup.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, behind, ".\n")
    )
    tokens: list[int] = []
    for source, target in [*halves(setup, relation)["found"][:3], pair]:
        tokens += [*before, source, *behind, target, *stop]
    tokens = tokens[: -len(stop)]
    scores = setup.rows(NAME)[f"{relation}/found"]["scores"]
    lists = {"dense": [], "best": best(scores, COUNT)}
    seed = (10, list(_RELATIONS).index(relation), number)
    lists["random"] = drawn(np.shape(scores), set(best(scores, 2 * COUNT)), COUNT, seed)
    found = {}
    for name, heads in lists.items():
        with silent(setup, heads):
            found[name] = round(float(losses(setup, tokens)[-1]), 4)
    return {"found": found}


def section(setup: Setup, pictures: Path | None) -> list[str]:
    rows = setup.rows(NAME)
    done = [name for name in _RELATIONS if f"{name}/without/1" in rows]
    lines = ["## Functions of heads from weights", ""]
    if not done:
        return [*lines, "Not measured yet."]
    lines += [
        f"MAPS, of pairs of words that are single tokens: the share of pairs whose second word is among the {TOP} "
        "tokens that the head promotes most where it attends to the first, by its weights alone. The best head of half "
        "of the pairs is scored on the others, and on the others with each other's second word. Then, in a prompt with "
        f"three pairs and one of the others, the outputs of the {COUNT} best heads are zero at every token, or those "
        f"of as many random ones, drawn anew for each prompt, outside the {2 * COUNT} best; the loss is of its second "
        "word.",
        "",
    ]
    table, claims = [], []
    for relation in done:
        tables = {name: np.array(rows[f"{relation}/{name}"]["scores"]) for name in ("found", "other", "wrong")}
        (layer, head), count = best(tables["found"], 1)[0], len(halves(setup, relation)["other"])
        share, wrong = (float(tables[name][layer, head]) for name in ("other", "wrong"))
        error = (share * (1 - share) / count) ** 0.5
        found = [row["found"] for key, row in rows.items() if key.startswith(f"{relation}/without/")]
        costs = {name: paired([row[name] for row in found], [row["dense"] for row in found]) for name in found[0]}
        dense = sum(row["dense"] for row in found) / len(found)
        table.append(
            [relation, f"{layer}-{head}", str(len(pairs(setup, relation))), f"{100 * share:.0f} ± {100 * error:.0f}"]
            + [f"{100 * wrong:.0f}", f"{int((tables['other'] >= 0.5).sum())}", f"{dense:.2f}"]
            + [f"{costs[name][0]:+.2f} ± {costs[name][1]:.2f}" for name in ("best", "random")]
        )
        pair = paired([row["best"] for row in found], [row["random"] for row in found])
        claims += [
            verdict(
                f"{relation}: the best head leads to the right word rather than to others' words",
                100 * (share - wrong),
                100 * (error**2 + wrong * (1 - wrong) / count) ** 0.5,
                "points",
                wants=1,
            ),
            verdict(
                f"{relation}: the word is less likely without the {COUNT} best heads than without random ones",
                *pair,
                "nats",
                wants=1,
            ),
        ]
    head = [
        "relation",
        "best head",
        "pairs",
        "right, %",
        "others' word, %",
        "heads of 50 % and more",
        "loss",
        f"without the {COUNT} best",
        f"without {COUNT} random",
    ]
    return [*lines, *markdown_table(head, table, texts=2), "", *claims]
