"""Massive activations (arXiv 2402.17762): which dimensions, at which tokens, and what zeroing them costs."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patchattn.evaluation.report.report import markdown_table
from patchattn.inspection.massive import MassiveActivations, massive_activations

from .common import Job, Row, Setup, paired, patched, verdict

NAME, STAGE = "massive", 0
WINDOW, SEARCHED = 512, 8  # tokens of a text, and texts that are searched: others than those that are scored
FILE = "massive.json"
_NAMES = {"zero": "set to zero", "mean": "set to their mean", "others": "as many others set to zero"}


def jobs(setup: Setup) -> list[Job]:
    ids = setup.tokenizer(setup.text.read_text("utf-8"), add_special_tokens=False)["input_ids"]
    count = min(len(ids) // WINDOW, SEARCHED + setup.samples)
    texts = [ids[number * WINDOW : (number + 1) * WINDOW] for number in range(count)]
    scored = texts[SEARCHED:]
    return [
        ("found", lambda: _search(setup, texts[:SEARCHED])),
        *((f"text/{n}", lambda text=text, n=n: _row(setup, text, n)) for n, text in enumerate(scored)),
    ]


def _search(setup: Setup, texts: list[list[int]]) -> Row:
    batches = [{"input_ids": torch.tensor([text])} for text in texts]
    found = massive_activations(setup.model, batches)
    if found.first is not None:
        setup.folder.mkdir(parents=True, exist_ok=True)
        found.save(setup.folder / FILE)
    return {
        "sequences": found.sequences,
        "layers": [
            {
                "largest": [round(size, 2) for size in each.largest],
                "median": round(each.median, 4),
                "dimensions": {
                    str(one): {"mean": round(it.mean, 1), "count": it.count, "tokens": it.tokens, "ids": it.ids}
                    for one, it in each.dimensions.items()
                },
            }
            for each in found.layers
        ],
    }


def interventions(found: MassiveActivations, width: int, seed: int) -> dict[str, dict[str, Any]]:
    """Settings of `massive` by name: those entries behind the first layer that has some, and as many other dimensions,
    which are zeroed at every token and so more of them."""
    (first,) = (each for each in found.layers if each.layer == found.first)
    outside = sorted(set(range(width)) - set(first.dimensions))
    drawn = np.random.default_rng((5, seed)).choice(outside, len(first.dimensions), replace=False)
    others = {str(first.layer): {str(one): 0.0 for one in drawn.tolist()}}
    values = {str(first.layer): {str(one): it.mean for one, it in first.dimensions.items()}}
    known = {"values": values, "threshold": found.threshold}
    return {
        "zero": {"activations": known},
        "mean": {"activations": known, "to": "mean"},
        "others": {"activations": others},
    }


@torch.inference_mode()
def _row(setup: Setup, text: list[int], number: int) -> Row:
    """Mean loss in nats, of every setting."""
    model, ids = setup.model, torch.tensor([text])

    def loss() -> float:
        logits = model(ids).logits[0, :-1].double()
        return round(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:])), 5)

    found = {"dense": loss()}
    if not (setup.folder / FILE).exists():  # nothing is massive
        return {"found": found}
    of_model = MassiveActivations.load(setup.folder / FILE)
    for name, settings in interventions(of_model, model.config.hidden_size, number).items():
        with patched(model, "massive", **settings):
            found[name] = loss()
    return {"found": found}


def section(setup: Setup, pictures: Path | None) -> list[str]:
    rows = setup.rows(NAME)
    lines = ["## Massive activations", ""]
    if "found" not in rows:
        return [*lines, "Not measured yet."]
    layers = rows["found"]["layers"]
    some = [(number, each) for number, each in enumerate(layers) if each["dimensions"]]
    sizes = [each["largest"][0] / each["median"] for each in layers]
    top = int(np.argmax(sizes))
    lines += [
        f"{rows['found']['sequences']} texts of {WINDOW} tokens, with no token in front of them. An entry of a layer's "
        "output is massive, as the paper says it, if it is above 100 and 1000 times the median size of its text. "
        "Largest and median sizes are means over texts, tokens are counted from 0.",
        "",
    ]
    if not some:
        return [
            *lines,
            f"- Some entries are massive: **not shown**; the largest are {layers[top]['largest'][0]:.0f}, "
            f"{sizes[top]:.0f} times the median, behind layer {top}.",
        ]
    dimensions = sorted({int(one) for _, each in some for one in each["dimensions"]})
    at_first = sum(it["tokens"].get("0", 0) for _, each in some for it in each["dimensions"].values())
    total = sum(it["count"] for _, each in some for it in each["dimensions"].values())
    lines += [
        f"- Few dimensions are massive: **shown**, {len(dimensions)} of {setup.model.config.hidden_size} "
        f"({', '.join(map(str, dimensions))}), behind {len(some)} of {len(layers)} layers, from layer {some[0][0]} to "
        f"layer {some[-1][0]}.",
        f"- They are at a text's first token: {100 * at_first / total:.0f} % of {total} entries{_elsewhere(some)}.",
        f"- The largest is {layers[top]['largest'][0]:.0f}, {sizes[top]:.0f} times the median, behind layer {top}.",
        "",
    ]
    table = [
        [
            str(layer),
            ", ".join(f"{one}: {it['mean']:+.0f}" for one, it in each["dimensions"].items()),
            f"{each['largest'][0]:.0f}",
            f"{each['median']:.2f}",
        ]
        for layer, each in (some[0], some[len(some) // 2], some[-1])
    ]
    lines += [*markdown_table(["layer", "dimension: mean", "largest", "median"], table, texts=2), ""]
    return [*lines, *_costs([row["found"] for key, row in rows.items() if key.startswith("text/")], some)]


def _elsewhere(some: list[tuple[int, Any]]) -> str:
    """At which other tokens entries are."""
    found: dict[int, int] = {}
    for _, each in some:
        for it in each["dimensions"].values():
            for token, count in it["tokens"].items():
                if token != "0":
                    found[int(token)] = found.get(int(token), 0) + count
    if not found:
        return ""
    often = sorted(found.items(), key=lambda pair: -pair[1])[:3]
    return "; the others mostly at " + ", ".join(f"token {token} ({count})" for token, count in often)


def _costs(rows: list[dict[str, float]], some: list[tuple[int, Any]]) -> list[str]:
    if not rows:
        return ["What they are for: not measured yet."]
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    against = {name: paired([row[name] for row in rows], [row["dense"] for row in rows]) for name in rows[0]}
    table = [
        [_NAMES.get(name, name), f"{mean[name]:.3f}", f"{math.exp(mean[name]):.2f}", *_signed(*against[name])]
        for name in rows[0]
    ]
    zero, kept, other = (against[name] for name in ("zero", "mean", "others"))
    of_pairs = paired([row["zero"] for row in rows], [row["others"] for row in rows])
    return [
        f"{len(rows)} other texts of {WINDOW} tokens; entries are changed behind layer {some[0][0]}, the first that "
        "has some. The others are drawn anew for each text, and zeroed at every token. Differences are of pairs, to "
        "the model as it is, with their standard errors.",
        "",
        *markdown_table(["massive entries", "loss, nats", "perplexity", "difference"], table, texts=1),
        "",
        verdict("Without massive entries texts are less likely", *zero, "nats a token", wants=1),
        verdict("That costs more than as many other dimensions", *of_pairs, "nats a token", wants=1),
        verdict("Their mean in their place costs something", *kept, "nats a token", wants=1),
        verdict("As many other dimensions cost something", *other, "nats a token", wants=1),
    ]


def _signed(difference: float, error: float) -> list[str]:
    return [f"{difference:+.3f} ± {error:.3f}"]
