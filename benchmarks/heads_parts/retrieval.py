"""The map of retrieval heads (arXiv 2404.15574): which heads copy a needle."""

from pathlib import Path

import numpy as np

from patchattn.calibration.retrieval import needle_trials
from patchattn.core.heads import BaseFacts
from patchattn.core.importance import HeadImportance, SiteScores
from patchattn.core.selection import select_sites
from patchattn.evaluation.report.report import markdown_table
from patchattn.inspection.retrieval import RetrievalTrial, retrieval_scores

from .common import Job, Row, Setup, mean_scores

NAME, STAGE = "retrieval", 0
THRESHOLD = 0.1  # the paper's, of a retrieval head


def jobs(setup: Setup) -> list[Job]:
    how = {"lengths": list(setup.lengths), "samples": setup.samples, "values": "numbers", "data": str(setup.text)}
    trials = needle_trials(setup.tokenizer, **how)  # those of a length together
    keys = [f"{length}/{number}" for length in setup.lengths for number in range(setup.samples)]
    order = sorted(range(len(keys)), key=lambda place: place % setup.samples)
    return [(keys[place], lambda trial=trials[place]: _row(setup, trial)) for place in order]


def _row(setup: Setup, trial: RetrievalTrial) -> Row:
    try:
        found = retrieval_scores(setup.model, [trial])
    except ValueError as error:
        if "in none of 1 trials" not in str(error):
            raise
        return {"scores": None}
    sites = sorted(found.scores.sites.values(), key=lambda site: site.layer)
    return {"scores": [[round(score, 5) for score in site.scores] for site in sites]}


def section(setup: Setup, pictures: Path | None) -> list[str]:
    rows = setup.rows(NAME)
    counted = [row for row in rows.values() if row["scores"] is not None]
    lines = ["## Retrieval heads", ""]
    if not counted:
        return [*lines, "Not measured yet."]
    scores = mean_scores(setup)
    every = np.array([row["scores"] for row in counted])
    errors = every.std(axis=0, ddof=1) / len(every) ** 0.5 if len(every) > 1 else np.full(scores.shape, np.nan)
    above, total = int((scores > THRESHOLD).sum()), scores.size
    zero = int((scores == 0).sum())
    best = [divmod(int(place), scores.shape[1]) for place in np.argsort(-scores, axis=None, kind="stable")[:10]]
    table = [[f"{a}-{b}", f"{scores[a, b]:.2f}", f"{errors[a, b]:.2f}"] for a, b in best]
    half = len(every) // 2
    lines += [
        f"{len(counted)} of {len(rows)} texts of {' and '.join(map(str, setup.lengths))} tokens count: the model "
        "expects more than half of the answer's tokens. A score is the share of the needle's tokens that a head's "
        "largest weight copies.",
        "",
        f"- Few heads retrieve: {above} of {total} ({100 * above / total:.0f} %) score above {THRESHOLD}; {zero} never "
        "copy a token. The paper says less than 5 %, of larger models.",
    ]
    if half:
        kept = [set(np.argsort(-part.mean(axis=0), axis=None, kind="stable")[:10]) for part in np.split(every, [half])]
        lines += [f"- The ten best of one half of the texts and of the other share {len(kept[0] & kept[1])} heads."]
    lines += ["", *markdown_table(["layer-head", "score", "standard error"], table, texts=1)]
    if pictures is not None:
        _draw(setup, scores, pictures / "heads_retrieval.png")
        lines += ["", "![Retrieval score of every head](heads_retrieval.png)"]
    return lines


def _draw(setup: Setup, scores: np.ndarray, path: Path) -> None:
    from patchattn.plotting import plot_head_importance

    sites = select_sites(setup.model)
    rows = {
        site.name: SiteScores(site.layer_index, site.kv_heads or 0, tuple(scores[site.layer_index].tolist()))
        for site in sites
    }
    importance = HeadImportance(rows, NAME, BaseFacts.of(setup.model, sites[0]), {}, 0)
    figure = plot_head_importance(importance, title="Retrieval heads", label="retrieval score")
    figure.savefig(path, dpi=100)
