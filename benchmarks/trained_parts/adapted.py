"""SmolLM2 with LoRA on queries and values and a variant beside it, against LoRA alone at equal steps."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from heads_parts.common import Job
from paired_rows import Row, paired
from peft import LoraConfig, get_peft_model

import patchattn
from patchattn.calibration.retrieval import needle_trials
from patchattn.demo.training import fit, lora_targets
from patchattn.evaluation.report.report import markdown_table
from patchattn.training import optimizer_groups
from patchattn.training.groups import fast_parameters

from .common import BLOCK, ROWS, Claim, Setup, claim, drawn, losses, perplexity

NAME, STAGE = "adapted", 2
RANK, RATE = 8, 3e-4  # of LoRA
FIRST_ROW = 64  # from which on rows count for the share of the first token
LOOKED = 2  # texts whose attention and states are looked at
# Variants: settings, and the rate of learning of what they add, 10 to 100 times LoRA's
ADDED: dict[str, tuple[dict[str, Any], float]] = {
    "sink": ({}, 3e-2),
    "gated": ({}, 3e-3),
    "fox": ({}, 1e-2),
    "differential": ({}, 1e-2),
    "attention_bias": ({"logit": -5.0}, 1e-2),
    "qk_norm": ({}, 1e-2),
    "talking_heads": ({}, 3e-3),
    "urpe": ({}, 3e-3),
    "entmax": ({}, 1e-2),
    "cope": ({}, 1e-2),
}
FIRST = ("sink", "gated", "fox")  # what has all its seeds before the others have any
ALONE, BEFORE = "LoRA alone", "before training"


def jobs(setup: Setup) -> list[Job]:
    if not setup.has_smol:
        return []
    groups = ((ALONE, *FIRST), tuple(name for name in ADDED if name not in FIRST))
    keys = [(name, setup.steps, seed) for names in groups for seed in range(setup.seeds) for name in names]
    return [
        (f"{name}/{steps}/{seed}", lambda name=name, steps=steps, seed=seed: _row(setup, name, steps, seed))
        for name, steps, seed in [(BEFORE, setup.steps, 0), *keys]
    ]


def _row(setup: Setup, name: str, steps: int, seed: int) -> Row:
    """Losses of texts at the start and after training, how far what is new moved, attention, states, and needles."""
    model, variant = setup.smol(), ADDED.get(name)
    settings, rate = ({}, 1.0) if variant is None else variant
    torch.manual_seed(seed)
    if variant is not None:
        patchattn.patch_model(model, name, dict(settings))
    found: Row = {"text": setup.text.name, "start": losses(model, setup.texts[:LOOKED])}
    if name != BEFORE:
        torch.manual_seed(seed)  # LoRA starts alike for all
        whole = None if variant is None else ["patchattn"]
        how = {"target_modules": lora_targets(model), "modules_to_save": whole}
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, task_type="CAUSAL_LM", **how))
        fast = fast_parameters(model)
        new = {key: each for key, each in model.named_parameters() if each.requires_grad and id(each) in fast}
        starts = {key: each.detach().clone() for key, each in new.items()}
        seen: list[float] = []
        groups = optimizer_groups(model, RATE, scale_learning_rate=rate)
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)  # as users train, and twice as fast
        fit(model, drawn(setup.train_ids, steps, seed), steps, groups, seen.append)
        del model.forward
        found |= {"autocast": "bfloat16", "moved": _moved(new, starts), "train": [round(each, 4) for each in seen]}
    found["losses"] = losses(model, setup.texts)
    found |= _looked_at(model, setup.texts[:LOOKED])
    found["needles"] = _needles(setup, model)
    return found


def _moved(new: Mapping[str, torch.Tensor], starts: Mapping[str, torch.Tensor]) -> dict[str, list[float]]:
    """By name, over layers: root mean square at the start, and of what it moved, and the most that a number did."""
    pieces: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for key, each in new.items():
        pieces.setdefault(key.rpartition(".")[2], []).append((starts[key].flatten(), each.detach().flatten()))
    found = {}
    for name, pairs in pieces.items():
        start, end = (torch.cat([pair[place] for pair in pairs]) for place in (0, 1))
        moved = end - start
        numbers = (start.square().mean().sqrt(), moved.square().mean().sqrt(), moved.abs().max())
        found[name] = [float(f"{number.item():.3g}") for number in numbers]
    return found


@torch.inference_mode()
def _looked_at(model: Any, texts: torch.Tensor) -> Row:
    """The share of attention on the first token, mean over layers, heads and rows, and the kurtosis of states, mean
    over layers."""
    inside = model.get_base_model() if hasattr(model, "get_base_model") else model
    inside.set_attn_implementation("eager")
    shares, peaks = [], []
    for row in texts:
        out = model(row[None], output_attentions=True, output_hidden_states=True, use_cache=False)
        shares += [weights[0, :, FIRST_ROW:, 0].double().mean().item() for weights in out.attentions]
        for states in out.hidden_states[1:-1]:  # the last one is normalised
            apart = states.double() - states.double().mean()
            peaks.append((apart.pow(4).mean() / apart.square().mean().square()).item())
    inside.set_attn_implementation("sdpa")
    return {"first": round(sum(shares) / len(shares), 5), "kurtosis": round(sum(peaks) / len(peaks), 1)}


@torch.inference_mode()
def _needles(setup: Setup, model: Any) -> list[list[float]]:
    """Of every prompt: whether all tokens of the answer are the most likely ones, and their loss in nats."""
    how = {"lengths": [1024], "samples": setup.needles, "values": "numbers", "data": str(setup.text)}
    found = []
    for trial in needle_trials(setup.tokenizer, **how):
        ids = torch.tensor([trial.tokens])
        logits = model(ids, use_cache=False, logits_to_keep=trial.answer + 1).logits[0, :-1].double()
        answer = ids[0, -trial.answer :]
        loss = torch.nn.functional.cross_entropy(logits, answer, reduction="sum").item()
        found.append([float((logits.argmax(-1) == answer).all()), round(loss, 4)])
    return found


def rows_by_steps(setup: Setup) -> dict[int, dict[str, dict[int, Row]]]:
    """Rows by steps, name and seed."""
    found: dict[int, dict[str, dict[int, Row]]] = {}
    for key, row in setup.rows(NAME).items():
        name, steps, seed = key.split("/")
        found.setdefault(int(steps), {}).setdefault(name, {})[int(seed)] = row
    return found


def _pairs(rows: dict[str, dict[int, Row]], name: str) -> tuple[list[float], list[float], str]:
    """Losses of a variant and of LoRA alone: of seeds where there are three, else of texts; and which of these."""
    own, alone = rows.get(name, {}), rows.get(ALONE, {})
    seeds = sorted(set(own) & set(alone))
    lists = [[each[seed]["losses"] for seed in seeds] for each in (own, alone)]
    if len(seeds) >= 3:
        first, second = ([sum(each) / len(each) for each in of] for of in lists)
        return first, second, "seeds"
    first, second = ([sum(each) / len(each) for each in zip(*of, strict=True)] for of in lists)
    return first, second, f"texts ({len(seeds)} of 3 seeds)"


def _compared(setup: Setup) -> dict[str, tuple[int, dict[str, dict[int, Row]]]]:
    """Of every variant: the most steps after which there is LoRA alone to compare it to, and the rows of these."""
    found = rows_by_steps(setup)
    steps = {name: [of for of, rows in found.items() if name in rows and ALONE in rows] for name in ADDED}
    return {name: (max(of), found[max(of)]) for name, of in steps.items() if of}


def claims(setup: Setup) -> list[Claim]:
    compared, result = _compared(setup), []
    for name, (steps, rows) in compared.items():
        own, alone, of = _pairs(rows, name)
        said = f"SmolLM2, {steps} steps: `{name}` beside LoRA has a lower loss than LoRA alone"
        result.append(claim(said, own, alone, "nats a token", wants=-1, of=of))
    for name in ("sink", "gated"):
        if name in compared:
            steps, rows = compared[name]
            seeds = sorted(set(rows[name]) & set(rows[ALONE]))
            pairs = ([100 * rows[each][seed]["first"] for seed in seeds] for each in (name, ALONE))
            said = f"SmolLM2, {steps} steps: with `{name}` the first token gets less attention"
            result.append(claim(said, *pairs, "points", wants=-1, of="seeds"))
    return result


def section(setup: Setup, pictures: Path | None) -> list[str]:
    found = rows_by_steps(setup)
    lines = ["## LoRA and a variant on SmolLM2", ""]
    if not any(ALONE in rows for rows in found.values()):
        return [*lines, "Not measured yet."]
    lines += [
        f"LoRA of rank {RANK} on queries and values, rate {RATE:g}; what a variant adds has the rate of the table and "
        f"no decay; {ROWS} rows of {BLOCK} tokens a step, the same ones for all of a seed. Differences are of the loss "
        "in nats a token to LoRA alone, in pairs of texts of 512 tokens, or of seeds where there are three, with their "
        f"standard errors. First is the share of attention that rows from {FIRST_ROW} on give to the first token, the "
        "mean over layers and heads; kurtosis that of the entries of layers' outputs, its mean over layers; a needle "
        "is a number of seven digits in a text of 1024 tokens, found if each token of the answer is the most likely "
        "one. Start is the largest change of a text's loss by the patch before training.",
        "",
    ]
    for steps in sorted(found):
        rows = [row for of in found[steps].values() for row in of.values()]
        how = ", by autocast to bfloat16" if any("autocast" in row for row in rows) else ""
        trained = f"Trained in float32{how}; measured on {', '.join(sorted({row['text'] for row in rows}))}."
        lines += [f"### {steps} steps", "", trained, "", *_table(found[steps]), "", *_movements(found[steps]), ""]
    compared = _compared(setup)
    if pictures is not None and compared:
        draw(compared, pictures / "trained_lora.png")
        lines += ["![Change of the loss by variants beside LoRA](trained_lora.png)"]
    return lines


def _table(rows: dict[str, dict[int, Row]]) -> list[str]:
    before, table = rows.get(BEFORE, {}), []
    for name, own in {
        **({BEFORE: before} if before else {}),
        **{n: rows[n] for n in (ALONE, *ADDED) if n in rows},
    }.items():
        each = [row["losses"] for row in own.values()]
        needles = [trial for row in own.values() for trial in row["needles"]]
        ppl = perplexity([sum(of) / len(of) for of in each])
        apart = "" if name in (ALONE, BEFORE) else "{:+.4f} ± {:.4f}".format(*paired(*_pairs(rows, name)[:2]))
        start = ""
        if before and name in ADDED:
            changes = [
                abs(a - b) for row in own.values() for a, b in zip(row["start"], before[0]["start"], strict=True)
            ]
            start = f"{max(changes):.1g}"
        cells = [name, f"{ADDED[name][1]:g}" if name in ADDED else "", str(len(own)), start, f"{ppl:.2f}", apart]
        cells += [f"{100 * sum(row['first'] for row in own.values()) / len(own):.1f}"]
        cells += [f"{sum(row['kurtosis'] for row in own.values()) / len(own):.0f}"]
        right = sum(trial[0] for trial in needles)
        cells += [f"{right:.0f} of {len(needles)}", f"{sum(trial[1] for trial in needles) / len(needles):.2f}"]
        table.append(cells)
    head = ["", "rate", "seeds", "start", "perplexity", "difference", "first, %", "kurtosis", "needles", "nats of them"]
    return markdown_table(head, table, texts=1)


def _movements(rows: dict[str, dict[int, Row]]) -> list[str]:
    """How far what is new moved."""
    table = []
    for name in ADDED:
        own = list(rows.get(name, {}).values())
        for parameter in own[0]["moved"] if own else ():
            start, moved, most = (sum(row["moved"][parameter][n] for row in own) / len(own) for n in range(3))
            table.append([name, f"`{parameter}`", f"{start:.3g}", f"{moved:.2g}", f"{most:.2g}"])
    if not table:
        return []
    head = ["", "parameter", "at the start", "moved", "most"]
    said = "How far new parameters moved, root mean squares over all layers, and the most that one number did:"
    return [said, "", *markdown_table(head, table, texts=2)]


def draw(compared: dict[str, tuple[int, dict[str, dict[int, Row]]]], path: Path) -> None:
    from matplotlib.figure import Figure

    from patchattn.plotting.style import BLUE, GREY, ORANGE

    names = [f"{name}, {steps} steps" for name, (steps, _) in compared.items()]
    pairs = [paired(*_pairs(rows, name)[:2]) for name, (_, rows) in compared.items()]
    shares = [
        [100 * sum(row["first"] for row in rows[each].values()) / len(rows[each]) for each in (name, ALONE)]
        for name, (_, rows) in compared.items()
    ]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    around = [0.0 if math.isnan(error) else 2 * error for _, error in pairs]
    axes[0].errorbar([each for each, _ in pairs], range(len(names)), xerr=around, fmt="o", color=BLUE, capsize=3)
    axes[0].set(title="Loss, two standard errors", xlabel="minus LoRA alone, nats a token")
    axes[0].axvline(0, color=GREY, linestyle=":")
    axes[0].set_yticks(range(len(names)), names)
    axes[1].barh(range(len(names)), [own - alone for own, alone in shares], color=ORANGE)
    axes[1].set(title="Attention on the first token", xlabel="minus LoRA alone, points")
    axes[1].axvline(0, color=GREY, linestyle=":")
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)
