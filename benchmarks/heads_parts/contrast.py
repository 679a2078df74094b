"""DeCoRe (2410.18860) and CAD (2305.14739) where a context contradicts what a model knows, and on questions alone."""

import re
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from patchattn.decoding.text import context_spans
from patchattn.evaluation.report.report import markdown_table
from patchattn.evaluation.tasks.generation import generate

from .common import Job, Row, Setup, paired, patched, top_and_random, verdict
from .facts import Fact, facts

NAME, STAGE = "contrast", 1
BATCH, TOKENS = 6, 14  # questions of a row, and tokens of an answer
HEADS = 20


def settings(setup: Setup, batch: int, task: str) -> dict[str, tuple[str, dict[str, Any]] | None]:
    lists = top_and_random(setup, (4, batch))
    top, other = lists[f"top {HEADS}"], lists[f"random {HEADS}"]
    found: dict[str, tuple[str, dict[str, Any]] | None] = {
        "dense": None,
        "decore": ("decore", {"heads": top}),
        "decore, alpha 0.5": ("decore", {"heads": top, "alpha": 0.5}),
        "decore, queries": ("decore", {"heads": top, "mask": "query"}),
        "decore, random heads": ("decore", {"heads": other}),
    }
    if task == "swapped":
        found |= {"cad, alpha 0.5": ("cad", {"alpha": 0.5}), "cad, alpha 1": ("cad", {"alpha": 1.0})}
    return found


def jobs(setup: Setup) -> list[Job]:
    asked = facts()
    batches = [asked[start : start + BATCH] for start in range(0, len(asked), BATCH)]
    return [
        (f"{task}/{number}", lambda b=batch, n=number, t=task: _row(setup, b, n, t))
        for number, batch in enumerate(batches)
        for task in ("swapped", "closed")
    ]


def prompt(tokenizer: Any, question: str, context: str) -> tuple[list[int], tuple[int, int] | None]:
    """Tokens of a message in its template, and which of them are the context, if there is one."""
    message = [{"role": "user", "content": f"{context} {question}" if context else question}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if not context:
        return found["input_ids"], None
    start = text.index(context)
    inside = [
        place
        for place, (a, b) in enumerate(found["offset_mapping"])
        if a >= start and b <= start + len(context) and b > a
    ]
    return found["input_ids"], (inside[0], inside[-1] + 1)


def _row(setup: Setup, asked: list[Fact], number: int, task: str) -> Row:
    built = [prompt(setup.tokenizer, fact.question, fact.context if task == "swapped" else "") for fact in asked]
    spans = [span for _, span in built if span is not None]
    found = {}
    for name, patch in settings(setup, number, task).items():
        with ExitStack() as stack:
            if patch is not None:
                stack.enter_context(patched(setup.model, patch[0], **patch[1]))
            stack.enter_context(context_spans(spans) if spans else nullcontext())
            answers = generate(setup.model, setup.tokenizer, [tokens for tokens, _ in built], max_new_tokens=TOKENS)
        found[name] = [answer["pred"] for answer in answers]
    return {"found": found, "known": [fact.known for fact in asked], "swapped": [fact.swapped for fact in asked]}


def says(answer: str, word: str) -> float:
    """100 if a word is in an answer, letters of either case."""
    return 100.0 * bool(re.search(rf"\b{re.escape(word)}\b", answer, re.IGNORECASE))


def scores(rows: list[Row], name: str, expected: str) -> list[float]:
    """Of all answers of a setting whether they say what is expected, `known` or `swapped`."""
    return [says(answer, word) for row in rows for answer, word in zip(row["found"][name], row[expected], strict=True)]


def section(setup: Setup, pictures: Path | None) -> list[str]:
    by_task: dict[str, list[Row]] = {"swapped": [], "closed": []}
    for key, row in setup.rows(NAME).items():
        by_task[key.split("/")[0]].append(row)
    swapped, closed = by_task["swapped"], by_task["closed"]
    lines = ["## Contrast", ""]
    if not swapped or not closed:
        return [*lines, "Not measured yet."]
    count = [sum(len(row["known"]) for row in rows) for rows in (swapped, closed)]
    lines += [
        f"{count[0]} questions whose context says something false (`swapped`, as NQ-Swap, but of generated sentences: "
        f"another capital, currency, author or language), and {count[1]} without a context (`closed`). Greedy answers "
        f"of at most {TOKENS} tokens. DeCoRe masks the {HEADS} best retrieval heads, outputs unless it says queries; "
        "its strength is the entropy unless it says alpha, with random heads too. CAD needs a context to leave out, so "
        "it has no closed questions. Differences are of pairs, to the dense model, with their standard errors.",
        "",
    ]
    table = []
    for name in swapped[0]["found"]:
        cells = [name]
        for rows, expected in ((swapped, "swapped"), (swapped, "known"), (closed, "known")):
            if name not in rows[0]["found"]:
                cells += ["", ""]
                continue
            found, dense = scores(rows, name, expected), scores(rows, "dense", expected)
            difference, error = paired(found, dense)
            cells += [f"{sum(found) / len(found):.0f}", "" if name == "dense" else f"{difference:+.1f} ± {error:.1f}"]
        table.append(cells)
    heads = ["swapped: says the context, %", "", "says what is known, %", "", "closed: right, %", ""]
    lines += [*markdown_table(["method", *heads], table, texts=1), ""]
    for name, other, rows, expected, claim in (
        ("cad, alpha 0.5", "dense", swapped, "swapped", "CAD (alpha 0.5) follows the context more often"),
        ("cad, alpha 1", "dense", swapped, "swapped", "CAD (alpha 1) follows the context more often"),
        ("decore", "dense", swapped, "swapped", "DeCoRe follows the context more often"),
        ("decore, alpha 0.5", "dense", swapped, "swapped", "DeCoRe (alpha 0.5) follows the context more often"),
        ("decore", "decore, random heads", swapped, "swapped", "DeCoRe follows it more often than with random heads"),
        ("decore", "dense", closed, "known", "DeCoRe knows more answers without a context"),
        ("decore, alpha 0.5", "dense", closed, "known", "DeCoRe (alpha 0.5) knows more answers without a context"),
        ("decore", "decore, random heads", closed, "known", "DeCoRe knows more than with random heads"),
    ):
        pair = paired(scores(rows, name, expected), scores(rows, other, expected))
        lines += [verdict(claim, *pair, "points", wants=1)]
    return lines
