"""Lookback Lens (arXiv 2407.07071): does attention to the context tell whether an answer keeps to it?"""

from pathlib import Path

import numpy as np
import torch
from scipy.stats import rankdata

from patchattn.calibration.lookback import out_of_fold
from patchattn.evaluation.report.report import markdown_table
from patchattn.evaluation.tasks.generation import generate
from patchattn.inspection.lookback import lookback_ratios

from .common import Job, Row, Setup, verdict
from .contrast import TOKENS, prompt, says
from .facts import Fact, facts

NAME, STAGE = "lookback", 0
BATCH, DRAWS, FOLDS, RESAMPLES = 8, 2, 5, 1000
BESIDE = 2  # other facts in a context


def jobs(setup: Setup) -> list[Job]:
    asked = [(draw, number) for draw in range(DRAWS) for number in range(len(facts()))]
    batches = [asked[start : start + BATCH] for start in range(0, len(asked), BATCH)]
    return [(str(number), lambda batch=batch: _row(setup, batch)) for number, batch in enumerate(batches)]


def question(draw: int, number: int) -> tuple[Fact, str]:
    """A fact of one draw of swaps, and a context that holds it among others, none of which answers the question."""
    known = facts(draw)
    fact = known[number]
    chosen = np.random.default_rng((6, draw, number))
    others = [each for each in known if {each.known, each.swapped}.isdisjoint({fact.known, fact.swapped})]
    beside = [others[place].context for place in chosen.choice(len(others), BESIDE, replace=False)]
    beside.insert(int(chosen.integers(BESIDE + 1)), fact.context)
    return fact, " ".join(beside)


def label(answer: str, fact: Fact) -> int | None:
    """1: it says what the context says; 0: what is known instead; `None`: both or neither."""
    keeps, strays = says(answer, fact.swapped) > 0, says(answer, fact.known) > 0
    return None if keeps == strays else int(keeps)


def _row(setup: Setup, batch: list[tuple[int, int]]) -> Row:
    """Greedy answers, their labels, mean ratios of every head, and mean log likelihoods of the answers' tokens."""
    asked = [question(*each) for each in batch]
    built = [prompt(setup.tokenizer, fact.question, context) for fact, context in asked]
    prompts, spans = [tokens for tokens, _ in built], [span or (0, 0) for _, span in built]
    answers = generate(setup.model, setup.tokenizer, prompts, max_new_tokens=TOKENS)
    said = [setup.tokenizer(each["pred"], add_special_tokens=False)["input_ids"] for each in answers]
    kept = [place for place, tokens in enumerate(said) if tokens]
    texts = [[*prompts[place], *said[place]] for place in kept]
    width = max(map(len, texts))
    pad = setup.tokenizer.pad_token_id
    inputs = {
        "input_ids": torch.tensor([[pad] * (width - len(text)) + text for text in texts]),
        "attention_mask": torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts]),
    }
    lengths = [len(said[place]) for place in kept]
    ratios = lookback_ratios(setup.model, inputs, context=[spans[place] for place in kept], answer=lengths)
    with torch.inference_mode():
        shares = setup.model(**inputs).logits[:, :-1].double().log_softmax(-1)
    likely = shares.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    found = []
    for row, place in enumerate(kept):
        found.append(
            {
                "question": asked[place][0].question,
                "answer": answers[place]["pred"],
                "label": label(answers[place]["pred"], asked[place][0]),
                "likelihood": round(float(likely[row, -lengths[row] :].mean()), 5),
                "ratios": [round(value, 3) for value in ratios[row].mean(0).flatten().tolist()],
            }
        )
    return {"found": found}


def better_way(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """A number as a score, in the direction that tells more of these answers."""
    return values if _area(labels, values) >= 0.5 else -values


def auroc(labels: np.ndarray, scores: dict[str, np.ndarray], questions: list[str]) -> dict[str, np.ndarray]:
    """Area under the curve of each score, the value first and then those of resampled questions."""
    names, places = sorted(set(questions)), {}
    for place, each in enumerate(questions):
        places.setdefault(each, []).append(place)
    draw, found = np.random.default_rng(0), {name: [_area(labels, each)] for name, each in scores.items()}
    while len(next(iter(found.values()))) <= RESAMPLES:
        rows = [row for at in draw.integers(len(names), size=len(names)) for row in places[names[at]]]
        if len(set(labels[rows].tolist())) == 2:
            for name, each in scores.items():
                found[name].append(_area(labels[rows], each[rows]))
    return {name: np.array(values) for name, values in found.items()}


def _area(labels: np.ndarray, scores: np.ndarray) -> float:
    """By the ranks of class 1, as Mann and Whitney count: much faster than scikit-learn for a thousand resamplings."""
    ones, total = int(labels.sum()), len(labels)
    ranks = float(rankdata(scores)[labels == 1].sum())
    return (ranks - ones * (ones + 1) / 2) / (ones * (total - ones))


def section(setup: Setup, pictures: Path | None) -> list[str]:
    rows = [each for row in setup.rows(NAME).values() for each in row["found"]]
    labelled = [each for each in rows if each["label"] is not None]
    lines = ["## Lookback Lens", ""]
    questions = [each["question"] for each in labelled]
    labels = np.array([each["label"] for each in labelled])
    if len(set(questions)) < 4 * FOLDS or len(set(labels.tolist())) < 2:
        return [*lines, "Not measured yet."]
    features = np.array([each["ratios"] for each in labelled])
    scores = {
        "probe on all heads": out_of_fold(setup.model, torch.tensor(features), labels.tolist(), questions, folds=FOLDS),
        "mean ratio of all heads": better_way(features.mean(1), labels),
        "likelihood of the answer": better_way(np.array([each["likelihood"] for each in labelled]), labels),
    }
    found = auroc(labels, scores, questions)
    table = [[name, f"{each[0]:.3f}", f"{each[1:].std():.3f}"] for name, each in found.items()]
    lines += [
        f"{len(rows)} greedy answers, of at most {TOKENS} tokens, to questions on contexts of {1 + BESIDE} statements, "
        f"one of which answers, falsely (as `swapped` above). {len(labelled)} answers are labelled by construction: "
        f"{int(labels.sum())} say the context's answer, {int((1 - labels).sum())} what is known instead; the others "
        "say both or neither. A feature is a head's mean ratio over the answer; the probe, a logistic regression of "
        f"{features.shape[1]} features, scores answers to questions that it was not fitted on ({FOLDS} folds). "
        "The two single numbers are taken in the direction that tells more of these answers, which favours them. "
        f"Standard errors are of {RESAMPLES} resamplings of questions; the folds stay.",
        "",
        *markdown_table(["score", "AUROC", "standard error"], table, texts=1),
        "",
    ]
    probe, *others = found
    for claim, other in (
        ("The probe tells answers that keep to the context from others (AUROC above .5)", None),
        *((f"It tells them better than the {name}", name) for name in others),
    ):
        gap = found[probe] - (0.5 if other is None else found[other])
        lines += [verdict(claim, float(gap[0]), float(gap[1:].std()), "of AUROC", wants=1)]
    return [
        *lines,
        "",
        "The paper says .91 and .85 of Llama-2-7B, of answers and summaries that a larger model judged.",
    ]
