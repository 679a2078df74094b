"""Singular directions of attention (arXiv 2410.00340): do few carry a pair, and who writes there?"""

from pathlib import Path

import numpy as np
import torch

from patchattn.core.selection import select_sites
from patchattn.evaluation.report.report import markdown_table
from patchattn.inspection.attention_directions import AttentionDirections, attention_directions
from patchattn.inspection.attention_maps import attention_maps

from .common import Job, Row, Setup, drawn, paired, silent, verdict, windows

NAME, STAGE = "directions", 2
TOKENS, PAIRS = 48, 4  # of a text
APART = 713  # from one text to the next, so that they are of several articles
TRIES = 40  # heads that are drawn for them, at most
ATTENDED = 0.3  # weight of a pair that is attended
WRITERS = 3  # earlier heads that are silenced


def jobs(setup: Setup) -> list[Job]:
    texts = windows(setup, TOKENS)[::APART][: max(2, setup.samples // 4)]
    return [(str(n), lambda text=text, n=n: _row(setup, text, n)) for n, text in enumerate(texts)]


def _weights(setup: Setup, text: list[int], layer: int, head: int) -> np.ndarray:
    """`(T, T)` attention."""
    (found,) = attention_maps(setup.model, {"input_ids": torch.tensor([text])}, layers=layer, heads=[head])
    return found.weights.numpy()


def _used(setup: Setup, text: list[int], **pair: int) -> AttentionDirections | None:
    """Its directions, or `None` where the logit is not above 0."""
    try:
        return attention_directions(setup.model, text, **pair)
    except ValueError as error:
        if "no share of what is not above 0" not in str(error):
            raise
        return None


def _row(setup: Setup, text: list[int], number: int) -> Row:
    """Pairs that are attended, of heads that are drawn; and what another key of the same head and query would take."""
    draw, found = np.random.default_rng((11, number)), []
    sites = select_sites(setup.model)
    heads = sites[0].query_heads or 0
    for tried in range(TRIES):
        if len(found) == PAIRS:
            break
        layer, head = int(draw.integers(1, len(sites))), int(draw.integers(heads))
        weights = _weights(setup, text, layer, head)
        inner = [(int(i), int(j)) for i, j in np.argwhere(weights > ATTENDED) if j > 0 and i > 4]  # 0 is a sink
        if not inner:
            continue
        query, key = inner[int(draw.integers(len(inner)))]
        other = int(draw.choice([place for place in range(1, query + 1) if place != key]))
        how = {"layer": layer, "head": head, "query": query}
        pair, beside = (_used(setup, text, **how, key=place) for place in (key, other))
        if pair is None:
            continue
        top = list(dict.fromkeys((a, b) for _, a, b, _ in pair.strongest(2 * heads * layer)))[:WRITERS]
        left = {}
        for name, some in (("writers", top), ("random", drawn((layer, heads), set(top), WRITERS, (12, number, tried)))):
            with silent(setup, some):
                left[name] = round(float(_weights(setup, text, layer, head)[query, key]), 4)
        counts = {"used": len(pair.used), "of": len(pair.terms), "other": None if beside is None else len(beside.used)}
        weight = round(float(weights[query, key]), 4)
        found.append({"layer": layer, "head": head, **counts, "attention": weight, "left": left})
    return {"pairs": found}


def section(setup: Setup, pictures: Path | None) -> list[str]:
    pairs = [pair for row in setup.rows(NAME).values() for pair in row["pairs"]]
    beside = [pair for pair in pairs if pair["other"] is not None]
    lines = ["## Directions of attention", ""]
    if len(pairs) < 2:
        return [*lines, "Not measured yet."]
    used, dims = np.array([pair["used"] for pair in pairs]), pairs[0]["of"]
    error = used.std(ddof=1) / len(used) ** 0.5
    few = sum(pair["used"] <= dims / 10 for pair in pairs)
    lines += [
        f"{len(pairs)} pairs of tokens in {len(setup.rows(NAME))} texts of {TOKENS} tokens, in heads that are drawn, "
        f"where one token gives the other more than {ATTENDED} of its attention and the other is not the text's first. "
        f"Directions are counted until nine tenths of the pair's logit is there; a head has {dims}. Beside each pair "
        "another earlier token is drawn, and counted if its logit is above 0. Then the outputs of the "
        f"{WRITERS} earlier heads that write most along the directions used are zero at every token, or those of as "
        "many random earlier ones; what is left of the pair's attention is compared.",
        "",
        f"- An attended pair takes {used.mean():.1f} ± {error:.1f} of {dims} directions (median {np.median(used):.0f}, "
        f"largest {used.max()}); {few} of {len(pairs)} take at most a tenth of them.",
        verdict(
            f"Few directions, fewer than a tenth of {dims}, carry an attended pair",
            float(used.mean() - dims / 10),
            float(error),
            "directions",
            wants=-1,
        ),
        verdict(
            f"They are fewer than those of another token of the same head and query ({len(beside)} pairs)",
            *paired([pair["used"] for pair in beside], [pair["other"] for pair in beside]),
            "directions",
            wants=-1,
        ),
        "",
    ]
    table = []
    for name, shown in (
        ("attention", "none"),
        ("writers", f"{WRITERS} that write most"),
        ("random", f"{WRITERS} random"),
    ):
        values = [100 * (pair["attention"] if name == "attention" else pair["left"][name]) for pair in pairs]
        pair = paired(values, [100 * pair["attention"] for pair in pairs])
        table.append(
            [shown, f"{np.mean(values):.1f}", "" if name == "attention" else f"{pair[0]:+.1f} ± {pair[1]:.1f}"]
        )
    lines += [*markdown_table(["silent heads", "attention of the pair, %", "difference"], table, texts=1), ""]
    cost = paired([100 * pair["left"]["writers"] for pair in pairs], [100 * pair["left"]["random"] for pair in pairs])
    return [
        *lines,
        verdict(
            "The pair's attention falls more without the heads that write there than without random ones",
            *cost,
            "points",
            wants=-1,
        ),
    ]
