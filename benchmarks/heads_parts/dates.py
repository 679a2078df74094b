"""Temporal heads (arXiv 2502.14258): do heads that dated prompts hang on serve other dated prompts, and those alone?"""

from pathlib import Path

import numpy as np

from patchattn.calibration.few_shot import first_answer_token, prompt_batches
from patchattn.evaluation.report.report import markdown_table
from patchattn.inspection.head_roles import ablation_scores, minus

from .common import Job, Row, Setup, best, drawn, losses, paired, silent, table_of, verdict

NAME, STAGE = "dates", 2
COUNT = 5
FOUND = 8  # prompts that heads are found on; each costs a forward for every head
# what follows "In 1942, ", and the answers by year
_KINDS = {
    "the prime minister of the United Kingdom was": "1942:Winston 1985:Margaret 1993:John 2003:Tony 2013:David "
    "2020:Boris",
    "the president of the United States was": "1865:Abraham 1935:Franklin 1962:John 1970:Richard 1985:Ronald 1996:Bill "
    "2004:George 2012:Barack",
    "the Summer Olympics were held in": "1964:Tokyo 1980:Moscow 1992:Barcelona 1996:Atlanta 2000:Sydney 2004:Athens "
    "2008:Beijing 2012:London",
    "the leader of Germany was": "1880:Otto 1938:Adolf 2010:Angela",
    "the leader of the Soviet Union was": "1920:Lenin 1940:Stalin 1960:Nikita 1988:Mikhail",
    "the FIFA World Cup was won by": "1998:France 2002:Brazil 2006:Italy 2010:Spain 2014:Germany",
}


def prompts() -> list[tuple[str, str, str]]:
    """With a date, without it, and the answer; in an order that is drawn."""
    found = [
        (f"In {year}, {what}", what[0].upper() + what[1:], f" {answer}")
        for what, pairs in _KINDS.items()
        for year, answer in (pair.split(":") for pair in pairs.split())
    ]
    return [found[place] for place in np.random.default_rng(0).permutation(len(found))]


def jobs(setup: Setup) -> list[Job]:
    some, others = prompts()[:FOUND], prompts()[FOUND:]
    return [
        ("heads", lambda: {"scores": _scores(setup, some)}),
        *((f"without/{n}", lambda one=one, n=n: _without(setup, one, n)) for n, one in enumerate(others)),
    ]


def _scores(setup: Setup, some: list[tuple[str, str, str]]) -> list[list[float]]:
    found = []
    for place in (0, 1):
        texts = [one[place] for one in some]
        answers = [first_answer_token(setup.tokenizer, text, one[2]) for text, one in zip(texts, some, strict=True)]
        made = prompt_batches(setup.tokenizer, texts, answers, len(texts))
        found.append(ablation_scores(setup.model, [one.inputs for one in made], [one.answers for one in made]))
    return table_of(minus(*found, "temporal"))


def _without(setup: Setup, one: tuple[str, str, str], number: int) -> Row:
    scores = np.array(setup.rows(NAME)["heads"]["scores"])
    lists = {"dense": [], "best": best(scores, COUNT)}
    lists["random"] = drawn(scores.shape, set(best(scores, 4 * COUNT)), COUNT, (9, number))
    found = {}
    for name, heads in lists.items():
        with silent(setup, heads):
            found[name] = [round(_loss(setup, text, one[2]), 4) for text in one[:2]]
    return {"found": found, "dated": one[0]}


def _loss(setup: Setup, text: str, answer: str) -> float:
    """Of the answer's first token behind a text."""
    ids = setup.tokenizer(text, add_special_tokens=False)["input_ids"]
    return float(losses(setup, [*ids, first_answer_token(setup.tokenizer, text, answer)])[-1])


def section(setup: Setup, pictures: Path | None) -> list[str]:
    rows = setup.rows(NAME)
    found = [row["found"] for key, row in rows.items() if key.startswith("without/")]
    lines = ["## Heads of dates", ""]
    if not found:
        return [*lines, "Not measured yet."]
    names = ", ".join(f"{layer}-{head}" for layer, head in best(rows["heads"]["scores"], COUNT))
    lines += [
        f"{len(prompts())} prompts such as *{prompts()[0][0]}*, of six kinds, and the same without their date. A "
        "head's score is how much less likely the answer's first token is without its output, in nats, minus the same "
        f"without the date: of {FOUND} prompts. Its {COUNT} best heads ({names}) are silent on the other "
        f"{len(found)}, or as many random ones, drawn anew for each prompt, outside the {4 * COUNT} best.",
        "",
    ]
    table = []
    for name in ("dense", "best", "random"):
        cells = [{"dense": "none", "best": f"the {COUNT} best"}.get(name, name)]
        for place in (0, 1):
            pair = paired([row[name][place] for row in found], [row["dense"][place] for row in found])
            mean = sum(row[name][place] for row in found) / len(found)
            cells += [f"{mean:.2f}", "" if name == "dense" else f"{pair[0]:+.2f} ± {pair[1]:.2f}"]
        table.append(cells)
    head = ["silent heads", "loss with a date, nats", "difference", "without a date", "difference"]
    lines += [*markdown_table(head, table, texts=1), ""]
    knows = paired([row["dense"][1] for row in found], [row["dense"][0] for row in found])
    cost = paired([row["best"][0] for row in found], [row["random"][0] for row in found])
    more = paired(
        [row["best"][0] - row["dense"][0] for row in found], [row["best"][1] - row["dense"][1] for row in found]
    )
    return [
        *lines,
        verdict("The model knows the answers better with the date", *knows, "nats", wants=1),
        verdict(
            "Dated answers are less likely without the best heads than without random ones", *cost, "nats", wants=1
        ),
        verdict("That costs dated answers more than the same without a date", *more, "nats", wants=1),
    ]
