"""Fewer kv heads: what each start of a conversion costs, and how much of it a few steps of training bring back."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from heads_parts.common import Job
from paired_rows import Row, paired
from transformers import AutoModelForCausalLM

import patchattn
from patchattn.core.host import find_sites
from patchattn.evaluation.report.report import markdown_table

from .common import BLOCK, ROWS, Claim, Setup, claim, drawn, losses, perplexity, windows

NAME, STAGE = "conversion", 1
STEPS, RATE = (0, 10, 20, 40), 3e-4  # after which it is measured, and of learning: queries, keys, values and output
TEXTS = 6  # of 512 tokens: SmolLM2's are measured after each number of steps
CALIBRATION = 16  # texts of 512 tokens, for `kv_moments`
KEPT = {"SmolLM2": (3, 1), "stories260K": (4, 2)}  # kv heads before and after
STARTS: dict[str, dict[str, Any] | None] = {
    "not converted": None,
    "mean": {"method": "mean"},
    "procrustes": {"method": "procrustes"},
    "components, not weighted": {"method": "components", "weighted": False},
    "components": {"method": "components"},
}
_SHOWN = "components"


def jobs(setup: Setup) -> list[Job]:
    models = [name for name, there in (("stories260K", setup.stories), ("SmolLM2", setup.has_smol)) if there]
    return [
        (f"{model}/{start}/{seed}", lambda m=model, s=start, n=seed: _row(setup, m, s, n))
        for seed in range(setup.seeds)
        for model in models
        for start in STARTS
    ]


def _loaded(setup: Setup, name: str) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The model, tokens to train on, and texts `(n, 512)` or shorter to measure on."""
    if name == "SmolLM2":
        return setup.smol(), setup.train_ids, setup.texts[:: max(1, len(setup.texts) // TEXTS)][:TEXTS]
    model = AutoModelForCausalLM.from_pretrained(setup.stories, dtype=torch.float32).eval()
    told = stories(model)
    count = len(told) // 4
    return model, told[count:].flatten(), told[:count]


@torch.no_grad()
def stories(model: Any) -> torch.Tensor:
    """`(96, 256)` tokens that stories260K writes itself, the same ones each time: there is no text of its own here."""
    torch.manual_seed(0)
    start = torch.full((96, 1), model.config.bos_token_id)
    how = {"do_sample": True, "top_k": 0, "min_new_tokens": BLOCK - 1, "max_new_tokens": BLOCK - 1, "pad_token_id": 0}
    return torch.as_tensor(model.generate(start, attention_mask=torch.ones_like(start), **how))


def _row(setup: Setup, name: str, start: str, seed: int) -> Row:
    """Loss of every text, by the number of steps; for stories260K of its own stories."""
    model, ids, texts = _loaded(setup, name)
    settings = STARTS[start]
    if settings is not None:
        length = 512 if name == "SmolLM2" else BLOCK
        moments = patchattn.kv_moments(model, [{"input_ids": row[None]} for row in windows(ids, length, CALIBRATION)])
        patchattn.patch_model(model, "gqa_convert", {"kv_heads": KEPT[name][1], "moments": moments, **settings})
    modules = [model.get_submodule(site.name) for site in find_sites(model)]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    found = {"0": losses(model, texts)}
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    model.train()
    for step, batch in enumerate(drawn(ids, max(STEPS), seed), start=1):
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        model.zero_grad()
        if step in STEPS:
            found[str(step)] = losses(model.eval(), texts)
            model.train()
    return {"losses": found}


def _found(setup: Setup, model: str) -> dict[str, list[tuple[int, Row]]]:
    """Seeds and rows, by start."""
    found: dict[str, list[tuple[int, Row]]] = {}
    for key, row in setup.rows(NAME).items():
        name, start, seed = key.split("/")
        if name == model:
            found.setdefault(start, []).append((int(seed), row))
    return {start: found[start] for start in STARTS if start in found}


def _pairs(found: dict[str, list[tuple[int, Row]]], start: str, other: str, step: int) -> tuple[list[float], ...]:
    """Losses of the texts of the seeds that both have, each text's mean over seeds."""
    own, theirs = (dict(found.get(name, [])) for name in (start, other))
    seeds = sorted(set(own) & set(theirs))
    return tuple(_means([rows[seed]["losses"][str(step)] for seed in seeds]) for rows in (own, theirs))


def _means(lists: Sequence[Sequence[float]]) -> list[float]:
    return [sum(each) / len(each) for each in zip(*lists, strict=True)]


def claims(setup: Setup) -> list[Claim]:
    result = []
    for model in KEPT:
        found = _found(setup, model)
        for other in ("mean", "procrustes", "components, not weighted"):
            for step in (min(STEPS), max(STEPS)):
                said = f"{model}, after {step} steps: `components` loses less than `{other}`"
                pairs = _pairs(found, _SHOWN, other, step)
                result.append(claim(said, *pairs, "nats a token", wants=-1, of="texts"))
    return result


def section(setup: Setup, pictures: Path | None) -> list[str]:
    lines = ["## Fewer kv heads", ""]
    if not any(_found(setup, model) for model in KEPT):
        return [*lines, "Not measured yet."]
    lines += [
        f"`gqa_convert` with moments of {CALIBRATION} texts that are trained on, then AdamW with a rate of {RATE:g} on "
        f"the projections of queries, keys, values and the output, {ROWS} rows of {BLOCK} tokens a step. Perplexity; "
        f"SmolLM2's is of {TEXTS} texts of 512 tokens, stories260K's of stories that it told itself, 256 tokens each, "
        "on others of which it is trained. Differences are of the loss in nats to `mean`, in pairs of texts, with "
        "their standard errors, at the start and at the end. Not converted is the model itself, trained likewise.",
        "",
    ]
    for model, (before, after) in KEPT.items():
        found = _found(setup, model)
        if not found:
            continue
        lines += [f"### {model}, {before} to {after} kv heads", ""]
        table = []
        for start, rows in found.items():
            each = {step: _means([row["losses"][str(step)] for _, row in rows]) for step in STEPS}
            cells = [start, str(len(rows)), *(f"{perplexity(each[step]):.4g}" for step in STEPS)]
            for step in (min(STEPS), max(STEPS)):
                own, theirs = _pairs(found, start, "mean", step)
                cells.append("" if start == "mean" or not own else "{:+.2f} ± {:.2f}".format(*paired(own, theirs)))
            table.append(cells)
        head = ["start", "seeds", *(f"{step} steps" for step in STEPS), "minus mean", "so after training"]
        lines += [*markdown_table(head, table, texts=1), ""]
    if pictures is not None:
        draw(setup, pictures / "trained_conversion.png")
        lines += ["![Perplexity after conversion, by steps of training](trained_conversion.png)"]
    return lines


def draw(setup: Setup, path: Path) -> None:
    from matplotlib.figure import Figure

    from patchattn.plotting.style import SERIES

    models = {model: kept for model, kept in KEPT.items() if _found(setup, model)}
    figure = Figure(figsize=(4.5 * len(models), 3.6), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for axis, (model, (before, after)) in zip(panels, models.items(), strict=True):
        for (start, rows), (colour, marker) in zip(_found(setup, model).items(), SERIES, strict=False):
            each = [
                math.exp(sum(of) / len(of)) for of in (_means([r["losses"][str(s)] for _, r in rows]) for s in STEPS)
            ]
            axis.plot(STEPS, each, color=colour, marker=marker, label=start)
        axis.set(title=f"{model}, {before} to {after} kv heads", xlabel="steps of training", yscale="log")
        axis.set_xticks(STEPS)
    figure.axes[0].set_ylabel("perplexity")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
