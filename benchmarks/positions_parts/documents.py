"""SmolLM2 on prompts of 10 and 20 documents: their order, other rotary bases, and documents that are read apart."""

import math
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from heads_parts.common import Job, verdict
from paired_rows import Row, paired
from transformers import AutoConfig

from patchattn import find_sites
from patchattn.calibration.rotary_bases import complementary_bases, rotary_frequencies
from patchattn.inspection.attention_sorting import attention_sorting
from patchattn.positions.looking import find_rotations
from patchattn.positions.marking import mark_segments

from .common import Setup, answers_table, mean, patched, scored
from .prompts import AFTER, BEFORE, Prompt, natural, one_hop, two_hops

NAME, STAGE = "documents", 1
Segments = list[tuple[str | None, str]]
KINDS = {"one": "one hop, 10 documents", "more": "one hop, 20 documents", "two": "two hops, 12 documents"}
KINDS |= {"natural": "hotpotqa, up to 10 documents"}
FEWEST = 8  # prompts that a claim is judged by
DISTANCES, BASES = (30, 700), 2  # of what stands in such prompts; branches beside the model's own
SETTINGS: dict[str, str | None] = {
    "plain": None,
    "sorted": None,
    "buckets": "attention_buckets",
    "parallel, shared sink": "parallel_context",
    "parallel, no shared sink": "parallel_context",
    "ape": "ape",
    "block_attention": "block_attention",
    "graph_kv": "graph_kv",
}


def jobs(setup: Setup) -> list[Job]:
    if setup.model is None:
        return []
    kinds: list[list[Job]] = [
        [(f"one/{n}", lambda n=n: _row(setup, one_hop(10, n))) for n in range(setup.samples)],
        [(f"two/{n}", lambda n=n: _row(setup, two_hops(12, n))) for n in range(setup.samples)],
        [(f"more/{n}", lambda n=n: _row(setup, one_hop(20, n))) for n in range(setup.samples // 2)],
    ]
    if setup.longbench is not None:
        found = natural(setup.longbench / "hotpotqa.json", setup.tokenizer)
        kinds.append([(f"natural/{n}", lambda p=p: _row(setup, p)) for n, p in enumerate(found)])
    return [job for job in chain.from_iterable(zip_longest(*kinds)) if job is not None]


def found_once(setup: Setup) -> tuple[Any, tuple[float, ...]]:
    """How the model rotates, and the bases that complement its own over the distances of these prompts."""
    if "bases" not in setup.loaded:
        model = setup.smol[0]
        frequencies, _ = rotary_frequencies(model)
        found = complementary_bases(frequencies, count=BASES, distances=DISTANCES).bases
        setup.loaded["bases"] = find_rotations(model, find_sites(model), by="positions.py"), found
    rotary, bases = setup.loaded["bases"]
    return rotary, bases


def segments(prompt: Prompt, order: Sequence[int] | None = None) -> Segments:
    """The prompt in parts, its documents in another order."""
    documents = prompt.documents if order is None else [prompt.documents[number] for number in order]
    return [
        ("prefix", BEFORE),
        *(("source", text) for text in prompt.sources),
        *(("document", text) for text in documents),
        (None, AFTER.format(question=prompt.question, start=prompt.start)),
    ]


@torch.inference_mode()
def _row(setup: Setup, prompt: Prompt) -> Row:
    """Of every setting whether all tokens of the answer are the most likely ones, and their mean loss; and how many
    tokens the prompt has, and how many of them stand behind the documents."""
    model, tokenizer = setup.smol
    rotary, bases = found_once(setup)
    found, counts = {}, []
    for setting, variant in SETTINGS.items():
        if setting == "graph_kv" and not prompt.sources:
            continue
        parts = segments(prompt)
        if setting == "sorted":
            every = [*prompt.sources, *prompt.documents]
            order = attention_sorting(model, tokenizer, every, parts[-1][1], before=BEFORE).order
            parts = [parts[0], *(("document", every[number]) for number in order), parts[-1]]
        marked = mark_segments(tokenizer, parts, add_special_tokens=False)
        answer = tokenizer(f" {prompt.answer}", add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*marked.input_ids, *answer]])
        spans: list[Any] = [list(span) for span in marked.spans]
        if setting in ("parallel, no shared sink", "block_attention"):
            spans = [["document", *span[1:]] for span in spans]
        chosen = {"attention_buckets": {"bases": bases, "rotary": rotary}, "block_attention": {"spans": spans}}
        how = {variant: chosen.get(variant, {"spans": spans, "rotary": rotary})} if variant is not None else {}
        with patched(model, how):
            logits = model(ids).logits[0, -len(answer) - 1 : -1]
        right, loss = scored(logits, ids[0, -len(answer) :])
        found[setting] = [float(right.all()), round(loss.mean().item(), 5)]
        counts = [len(marked.input_ids), len(marked.input_ids) - marked.spans[-1].end]
    return {"found": found, "tokens": counts}


def section(setup: Setup, pictures: Path | None) -> list[str]:
    rows = setup.rows(NAME)
    lines = ["## Prompts of documents", ""]
    if not rows:
        return [*lines, "Not measured yet."]
    lines += [
        "SmolLM2-135M-Instruct. Of generated documents, one says who the mayor of a town is, beside as many of other "
        "towns; or, in two hops, a source says on which river a town is and a document who lives there. Natural ones "
        "are those of MiniLongBench's hotpotqa, each passage cut to a window, around the answer where it holds it. How "
        "the answer begins is given; it is right if each of its tokens is the most likely one behind the true ones "
        "before it, which is to say that greedy decoding writes it. `sorted` is one round of Attention Sorting, "
        f"`buckets` merges {BASES} bases that `complementary_bases` finds for distances of {DISTANCES[0]} to "
        f"{DISTANCES[1]}. Behind a shared sink all documents see the instruction; without one it is a piece like the "
        "others, as for block attention, whose model is meant to be tuned for it and was not. APE has T = S = 0.9. "
        "Differences are of pairs, to plain, with their standard errors.",
        "",
    ]
    for kind, title in KINDS.items():
        own = [row for key, row in rows.items() if key.startswith(f"{kind}/")]
        if not own:
            continue
        tokens = [mean([row["tokens"][place] for row in own]) for place in (0, 1)]
        spared = ""
        if setup.model is not None:
            config = AutoConfig.from_pretrained(setup.model)
            shares = [operations(config, t, t - b) / operations(config, t) for t, b in (row["tokens"] for row in own)]
            spared = f" With the documents stored, the first token takes {100 * mean(shares):.0f} % of the operations."
        lines += [
            f"### {title[0].upper()}{title[1:]}",
            "",
            f"{len(own)} prompts of {tokens[0]:.0f} tokens in the mean, {tokens[1]:.0f} of them behind the documents."
            f"{spared}",
            "",
            *answers_table(SETTINGS, [row["found"] for row in own]),
        ]
    return [*lines, *_claims(rows)]


# claim, setting, what it is compared to, whether of two hops alone, the sign that the loss is to have
_CLAIMED = (
    ("Attention Sorting: answers are likelier than in plain order", "sorted", "plain", False, -1),
    ("Attention Buckets: answers are likelier than with the model's own base", "buckets", "plain", False, -1),
    ("Parallel encoding loses answers", "parallel, no shared sink", "plain", False, 1),
    ("A shared sink makes parallel encoding better", "parallel, shared sink", "parallel, no shared sink", False, -1),
    ("APE is better than parallel encoding as it is", "ape", "parallel, shared sink", False, -1),
    ("Block attention loses answers without tuning", "block_attention", "plain", False, 1),
    ("Graph-KV answers two hops better than parallel encoding", "graph_kv", "parallel, shared sink", True, -1),
)


def _claims(rows: dict[str, Row]) -> list[str]:
    """What papers claim, over all kinds of prompts; of Graph-KV over two hops."""
    over = f"Over all prompts above, of which {FEWEST} at least are needed, by the loss of answers and by right ones:"
    lines = ["### What is claimed", "", over, ""]
    for claim, setting, other, hops, sign in _CLAIMED:
        found = [row["found"] for key, row in rows.items() if key.startswith("two/") or not hops]
        loss = paired([row[setting][1] for row in found], [row[other][1] for row in found])
        right = paired([100 * row[setting][0] for row in found], [100 * row[other][0] for row in found])
        for how, (difference, error), unit, wants in (
            ("the loss", loss, "nats a token", sign),
            ("right answers", right, "points", -sign),
        ):
            trusted = error if len(found) >= FEWEST else math.nan
            lines.append(verdict(f"{claim}, by {how}", difference, trusted, unit, wants=wants))
    return [*lines, ""]


def operations(config: Any, tokens: int, stored: int = 0) -> float:
    """Multiplications of a Llama's layers on a prompt, of which the keys and values of the first tokens are stored."""
    width, kv = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    weights = config.hidden_size * (2 * width + 2 * kv + 3 * config.intermediate_size)
    pairs = tokens * (tokens + 1) / 2 - stored * (stored + 1) / 2
    return config.num_hidden_layers * (weights * (tokens - stored) + 2 * width * pairs)
