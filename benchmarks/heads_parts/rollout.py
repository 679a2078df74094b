"""Rollout (arXiv 2005.00928) against gradient x input: which says better what a classifier's answer hangs on?"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from transformers import AutoModelForSequenceClassification

from patchattn.demo.tasks import Sst2Task
from patchattn.demo.training import fit
from patchattn.evaluation.report.report import markdown_table
from patchattn.inspection.attention_maps import attention_maps
from patchattn.inspection.rollout import attention_rollout

from .common import Job, Row, Setup, paired, verdict

NAME, STAGE = "rollout", 0
STEPS, LEARNING_RATE = 250, 1e-4
SENTENCES, BATCH, LEAST = 160, 16, 6  # of how many tokens at least
METHODS = {
    "rollout": "rollout",
    "last": "attention of the last layer",
    "mean": "attention, mean of the layers",
    "gradient": "gradient x input",
}


def jobs(setup: Setup) -> list[Job]:
    if setup.encoder is None or setup.sentences is None:
        return []
    starts = range(0, SENTENCES, BATCH)
    return [
        ("trained", lambda: _train(setup)),
        *((str(start // BATCH), lambda start=start: _row(setup, start)) for start in starts),
    ]


def _task(setup: Setup) -> Sst2Task:
    return Sst2Task(str(setup.encoder), setup.sentences)


def _train(setup: Setup) -> Row:
    """Fine-tune the encoder, all of it, and keep the classifier beside the rows."""
    task = _task(setup)
    model: Any = task.new_model(0)
    groups = [{"params": list(model.parameters()), "lr": LEARNING_RATE}]
    fit(model, task.train_batches(0, STEPS), STEPS, groups, lambda loss: None)
    right = count = 0
    with torch.inference_mode():
        for batch in task.test_batches():
            labels = batch.pop("labels")
            some = task.score(model(**batch).logits, labels)
            right, count = right + some[0], count + some[1]
    model.save_pretrained(setup.folder / "classifier")
    return {"steps": STEPS, "accuracy": round(100 * right / count, 2), "sentences": count}


@functools.cache
def _classifier(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def _row(setup: Setup, start: int) -> Row:
    """Spearman's correlations of sentences, of each method with blanking out and of rollout with gradient x input."""
    task, model = _task(setup), _classifier(setup.folder / "classifier")
    texts = [task.tokenizer(text)["input_ids"] for text, _ in task.test]
    long = [ids for ids in texts if len(ids) - 2 >= LEAST][start : start + BATCH]
    found = []
    for ids in long:
        scores = importances(model, ids)
        blank = blanked(model, ids, task.tokenizer.mask_token_id)
        row = {name: round(float(spearmanr(each, blank).statistic), 4) for name, each in scores.items()}
        between = round(float(spearmanr(scores["rollout"], scores["gradient"]).statistic), 4)
        found.append(row | {"between": between})
    return {"found": found}


def importances(model: Any, ids: list[int]) -> dict[str, np.ndarray]:
    """Of each method how much every token counts for the first, which the answer is read from; without both ends."""
    inputs = {"input_ids": torch.tensor([ids])}
    rolled = attention_rollout(model, inputs).weights[-1, 0]
    maps = attention_maps(model, inputs)
    every = torch.stack([each.weights[0] for each in maps])
    last = every[[each.site.layer_index == each.site.layer_count - 1 for each in maps]].mean(0)
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits[0]
    (gradient,) = torch.autograd.grad(logits.max(), embedded)
    product = (gradient * embedded.detach()).sum(-1)[0].abs()
    found = {"rollout": rolled, "last": last, "mean": every.mean(0), "gradient": product}
    return {name: np.asarray(values[1:-1].double()) for name, values in found.items()}


@torch.inference_mode()
def blanked(model: Any, ids: list[int], mask: int) -> np.ndarray:
    """By how much the probability of the answer changes where a token is masked, for each but both ends."""
    rows = torch.tensor([ids] * (len(ids) - 1))
    for place in range(1, len(ids) - 1):
        rows[place, place] = mask
    shares = model(rows).logits.double().softmax(-1)
    answer = int(shares[0].argmax())
    return np.asarray((shares[1:, answer] - shares[0, answer]).abs())


def section(setup: Setup, pictures: Path | None) -> list[str]:
    rows = setup.rows(NAME)
    lines = ["## Rollout against gradient x input", ""]
    found = [each for key, row in rows.items() if key != "trained" for each in row["found"]]
    if not found:
        return [*lines, "Not measured yet."]
    trained = rows["trained"]
    values = {name: [each[name] for each in found] for name in (*METHODS, "between")}
    nothing = [0.0] * len(found)
    table = []
    for name, told in METHODS.items():
        difference = "" if name == "rollout" else _signed(*paired(values["rollout"], values[name]))
        table.append([told, _signed(*paired(values[name], nothing)), difference])
    lines += [
        f"An encoder (all-MiniLM-L6-v2, all of it fine-tuned on SST-2 for {trained['steps']} batches of 32: "
        f"{trained['accuracy']:.1f} % of {trained['sentences']} development sentences right) and the first "
        f"{len(found)} of them of at least {LEAST} tokens. What an answer hangs on is how much its probability changes "
        "where one token is masked. A method's score is Spearman's correlation with that over a sentence's tokens, the "
        "mean over sentences with its standard error; attention is the first token's row, the mean over heads.",
        "",
        *markdown_table(["method", "correlation", "rollout's, minus this one"], table, texts=1),
        "",
        f"Rollout and gradient x input correlate by {_signed(*paired(values['between'], nothing))}.",
        "",
    ]
    for claim, name in (
        ("Rollout tells what an answer hangs on (correlation above 0)", None),
        ("Rollout tells it better than the attention of the last layer", "last"),
        ("Rollout tells it better than the mean attention of the layers", "mean"),
        ("Rollout tells it better than gradient x input", "gradient"),
    ):
        other = nothing if name is None else values[name]
        lines += [verdict(claim, *paired(values["rollout"], other), "of correlation", wants=1)]
    return lines


def _signed(difference: float, error: float) -> str:
    return f"{difference:+.3f} ± {error:.3f}"
