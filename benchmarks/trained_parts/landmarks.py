"""SmolLM2 tuned to read earlier sections through landmarks: what that costs, and whether a few sections are enough."""

from pathlib import Path
from typing import Any

import torch
from heads_parts.common import Job
from paired_rows import Row, paired
from peft import LoraConfig, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from scipy import stats

import patchattn
from patchattn.calibration.retrieval import needle_trials
from patchattn.demo.training import fit, lora_targets
from patchattn.evaluation.report.report import markdown_table
from patchattn.positions.landmarks import IGNORED, insert_landmarks

from . import adapted
from .common import Claim, Setup, claim, drawn, perplexity

NAME, STAGE = "landmarks", 2
MARK = "<empty_output>"  # a special token that the texts do not have
EVERY = 31  # tokens of a section
ALL = "all"
TOPS = {ALL: None, "4": 4, "1": 1}  # earlier sections that a row reads
MARK_RATE = 3e-3  # of the landmark's embedding
ALLOWED = 0.05  # nats a token that reading fewer sections may cost


def jobs(setup: Setup) -> list[Job]:
    if not setup.has_smol:
        return []
    keys = [(0, 0), *((setup.steps, seed) for seed in range(setup.seeds))]
    return [(f"{steps}/{seed}", lambda steps=steps, seed=seed: _row(setup, steps, seed)) for steps, seed in keys]


def _row(setup: Setup, steps: int, seed: int) -> Row:
    """Losses of texts, and needles, by how many sections are read, after training with all of them."""
    model, token = setup.smol(), setup.tokenizer.convert_tokens_to_ids(MARK)
    found: Row = {}
    if steps:
        model, found["train"] = _trained(model, setup, token, steps, seed)
    for name, top in TOPS.items():
        with patchattn.patched(model, "landmark", token=token, top=top, preset="paper"):
            losses = [_losses(model, row.tolist(), token).mean().item() for row in setup.texts]
            found[name] = {"losses": [round(each, 5) for each in losses], "needles": _needles(setup, model, token)}
    return found


def _trained(model: Any, setup: Setup, token: int, steps: int, seed: int) -> tuple[Any, list[float]]:
    """The model with LoRA and an embedding of the landmark, trained on texts with landmarks, and its losses."""
    embedding = model.get_input_embeddings()
    marked = {next(name for name, each in model.named_modules() if each is embedding): [token]}
    torch.manual_seed(seed)  # LoRA starts as it does beside the other variants
    how: dict[str, Any] = {"target_modules": lora_targets(model), "trainable_token_indices": marked}
    model = get_peft_model(model, LoraConfig(r=adapted.RANK, lora_alpha=2 * adapted.RANK, task_type="CAUSAL_LM", **how))
    layers = [each for each in model.modules() if isinstance(each, TrainableTokensLayer)]
    marks = list({id(p): p for layer in layers for p in layer.parameters() if p.requires_grad}.values())
    rest = [p for p in model.parameters() if p.requires_grad and all(p is not each for each in marks)]
    groups = [{"params": rest, "lr": adapted.RATE}, {"params": marks, "lr": MARK_RATE}]
    seen: list[float] = []
    with patchattn.patched(model, "landmark", token=token, preset="paper"):
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
        fit(model, [_batch(each, token) for each in drawn(setup.train_ids, steps, seed)], steps, groups, seen.append)
        del model.forward
    return model, [round(each, 4) for each in seen]


def _batch(rows: dict[str, torch.Tensor], token: int) -> dict[str, torch.Tensor]:
    """A batch of texts of the same length, with landmarks in it."""
    texts = [insert_landmarks(row, token=token, every=EVERY) for row in rows["input_ids"].tolist()]
    return {"input_ids": torch.tensor([t.input_ids for t in texts]), "labels": torch.tensor([t.labels for t in texts])}


@torch.inference_mode()
def _losses(model: Any, tokens: list[int], token: int) -> torch.Tensor:
    """`(n - 1,)` losses in nats of a text's own tokens but the first."""
    text = insert_landmarks(tokens, token=token, every=EVERY)
    logits = model(torch.tensor([text.input_ids]), use_cache=False).logits[0, :-1].double()
    labels = torch.tensor(text.labels[1:])
    is_text = labels != IGNORED
    return torch.nn.functional.cross_entropy(logits[is_text], labels[is_text], reduction="none")


def _needles(setup: Setup, model: Any, token: int) -> list[float]:
    """Of every prompt the loss of its answer in nats."""
    how: dict[str, Any] = {"lengths": [1024], "samples": setup.needles, "values": "numbers", "data": str(setup.text)}
    trials = needle_trials(setup.tokenizer, **how)
    return [round(_losses(model, list(each.tokens), token)[-each.answer :].sum().item(), 4) for each in trials]


def _found(setup: Setup) -> tuple[int, dict[int, Row], Row | None]:
    """The most steps there are, the rows of it by seed, and that of no training."""
    rows = {tuple(map(int, key.split("/"))): row for key, row in setup.rows(NAME).items()}
    steps = max((steps for steps, _ in rows), default=0)
    return steps, {seed: row for (of, seed), row in rows.items() if of == steps and of}, rows.get((0, 0))


def _over_seeds(rows: dict[int, Row], name: str, what: str = "losses") -> list[float]:
    """Of each text or prompt the mean over seeds."""
    each = [row[name][what] for row in rows.values()]
    return [sum(of) / len(of) for of in zip(*each, strict=True)]


def _costs_little(said: str, found: list[float], other: list[float], of: str) -> Claim:
    """Shown if the 95 % interval of what is lost lies below what is allowed."""
    if len(found) < 3:
        return Claim(said, "not measured", f"{len(found)} {of}, 3 are needed")
    lost, error = paired(found, other)
    most = lost + float(stats.t.ppf(0.975, len(found) - 1)) * error
    shown = "**shown**" if most < ALLOWED else "not shown"
    return Claim(said, shown, f"{lost:+.3g} ± {error:.2g} nats a token, {len(found)} {of}")


def claims(setup: Setup) -> list[Claim]:
    steps, rows, before = _found(setup)
    if not rows or before is None:
        return []
    beside = adapted.rows_by_steps(setup).get(steps, {}).get(adapted.ALONE, {})
    seeds = sorted(set(rows) & set(beside))
    means = [
        [sum(of) / len(of) for of in lists]
        for lists in ([rows[s][ALL]["losses"] for s in seeds], [beside[s]["losses"] for s in seeds])
    ]
    said = f"SmolLM2, {steps} steps: `landmark`"
    result = [_costs_little(f"{said} costs less than {ALLOWED:g} nats beside LoRA alone", *means, "seeds")]
    whole = _over_seeds(rows, ALL)
    for name in TOPS:
        if name != ALL:
            what = f"{said} reading {name} of up to 16 earlier sections costs less than {ALLOWED:g} nats beside all"
            result.append(_costs_little(what, _over_seeds(rows, name), whole, "texts"))
    needles = [_over_seeds(each, "4", "needles") for each in (rows, {0: before})]
    what = f"{said} foretells a needle, 4 of 33 sections read, better than before training"
    result.append(claim(what, *needles, "nats", wants=-1, of="prompts"))
    return result


def section(setup: Setup, pictures: Path | None) -> list[str]:
    steps, rows, before = _found(setup)
    lines = ["## Landmarks on SmolLM2", ""]
    if not rows or before is None:
        return [*lines, "Not measured yet."]
    lines += [
        f"`landmark` with its paper's weights alone and a landmark behind every {EVERY} tokens, LoRA as beside the "
        f"variants above, and the landmark's embedding with a rate of {MARK_RATE:g}; {steps} steps that read all "
        f"sections, {len(rows)} seeds. Losses are of the texts' own tokens, the same as above; differences to all "
        "sections in pairs of texts. A needle is as above; its loss in nats is of all its tokens.",
        "",
    ]
    table = []
    for name, of in {"before training": {0: before}, f"after {steps} steps": rows}.items():
        for read in TOPS:
            losses, needles = _over_seeds(of, read), _over_seeds(of, read, "needles")
            apart = "" if read == ALL else "{:+.4f} ± {:.4f}".format(*paired(losses, _over_seeds(of, ALL)))
            table.append([name, read, f"{perplexity(losses):.2f}", apart, f"{sum(needles) / len(needles):.2f}"])
    head = ["", "sections read", "perplexity", "difference", "nats of needles"]
    return [*lines, *markdown_table(head, table, texts=2)]
