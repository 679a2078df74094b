"""Retrieval scores against loops over the attention matrices that eager attention gives."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import patchattn
from patchattn.calibration.retrieval import needle_trials
from patchattn.cli import main as cli
from patchattn.core.heads import BaseFacts, HeadList
from patchattn.core.importance import HeadImportance, SiteScores
from patchattn.inspection import retrieval
from patchattn.inspection.retrieval import RetrievalScores, RetrievalTrial, retrieval_scores

from .long_context import BYTES
from .long_context import tiny_llama as byte_llama
from .reference import HEADS, tiny_llama

TRIALS = [
    RetrievalTrial([3, 7, 9, 9, 9, 9, 9, 9, 4, 22, 9, 9, 9], (2, 8), 3),
    RetrievalTrial([5, 9, 8, 9, 8, 9, 8, 2, 6, 1, 9, 8, 9, 8], (1, 7), 4),
]


def knowing(token: int) -> Any:
    """A model that always expects the same token."""
    model: Any = tiny_llama(num_hidden_layers=2, attn_implementation="eager")
    weight = model.lm_head.weight
    model.lm_head = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    with torch.no_grad():
        model.lm_head.bias.zero_()
        model.lm_head.bias[token] = 1e6
    return model


def expected(model: nn.Module, trial: RetrievalTrial) -> np.ndarray:
    """`(layers, heads)`, row by row."""
    with torch.no_grad():
        matrices = model(torch.tensor([trial.tokens]), output_attentions=True).attentions
    start, stop = trial.needle
    scores = np.zeros((2, HEADS))
    for layer, head in np.ndindex(*scores.shape):
        for row in range(len(trial.tokens) - trial.answer - 1, len(trial.tokens) - 1):
            weights = matrices[layer][0, head, row].tolist()
            most = weights.index(max(weights))
            if start <= most < stop and trial.tokens[most] == trial.tokens[row + 1]:
                scores[layer, head] += 1 / (stop - start)
    return scores


@pytest.mark.parametrize("variant", [None, "ssa"])
@pytest.mark.parametrize("base", ["eager", "sdpa"])
def test_scores_are_those_of_whole_matrices(base: str, variant: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "_LEAST_ANSWERED", -1.0)
    model = knowing(9)
    if variant is not None:
        patchattn.patch_model(model, variant)
        for name, parameter in model.named_parameters():
            if ".patchattn." in name:  # far from the identity, with which SSA starts
                parameter.data.fill_(2.0)
    want = np.mean([expected(model, trial) for trial in TRIALS], axis=0)
    fresh = knowing(9)
    fresh.set_attn_implementation(base)
    if variant is not None:
        patchattn.patch_model(fresh, variant)
        fresh.load_state_dict(model.state_dict())
    assert want.max() > 0
    for size in (1, 2, 5):  # texts of unequal lengths, padded, with answers of unequal lengths
        found = retrieval_scores(fresh, TRIALS, batch_size=size)
        np.testing.assert_allclose([site.scores for site in found.scores.sites.values()], want)
        assert (found.counted, found.trials, found.scores.tokens) == (2, 2, 7)


def test_a_head_that_copies_more_tokens_than_the_needle_has_scores_above_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "_LEAST_ANSWERED", -1.0)
    model = tiny_llama(num_hidden_layers=1)
    with torch.no_grad():  # a key of its own for token 9, that all queries look at
        model.model.layers[0].self_attn.q_proj.weight.zero_()
    trial = RetrievalTrial([9, 3, 4, 9, 9, 9], (0, 1), 3)
    scores = retrieval_scores(model, [trial]).scores.scores["model.layers.0.self_attn"]
    assert scores == [3.0] * HEADS  # all weights equal: the first key counts, in each of three rows


def test_padding_moves_no_needle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A longer text pads a trial beside it, and its needle lies further along: scores are those of each alone."""
    monkeypatch.setattr(retrieval, "_LEAST_ANSWERED", -1.0)
    first = TRIALS[0]
    moved = RetrievalTrial([6, 2, 11, *first.tokens], (first.needle[0] + 3, first.needle[1] + 3), first.answer)
    want = np.mean([expected(knowing(9), trial) for trial in (first, moved, first)], axis=0)
    found = retrieval_scores(knowing(9), [first, moved, first], batch_size=3)
    np.testing.assert_allclose([site.scores for site in found.scores.sites.values()], want)
    with pytest.raises(ValueError, match="batch_size=0"):
        retrieval_scores(knowing(9), TRIALS, batch_size=0)


def test_a_trial_counts_if_more_than_half_of_its_answer_is_expected() -> None:
    model = knowing(9)
    assert retrieval_scores(model, TRIALS).counted == 1  # of the second one, 9 8 9 8, it knows no more than half
    want = expected(model, TRIALS[0])
    got = np.array([site.scores for site in retrieval_scores(model, TRIALS).scores.sites.values()])
    np.testing.assert_allclose(got, want)
    with pytest.raises(ValueError, match="no trials"):
        retrieval_scores(tiny_llama(), [])
    with pytest.raises(ValueError, match="in none of 1 trials"):
        retrieval_scores(model, TRIALS[1:])


def test_the_highest_heads_are_a_list_for_decore_and_heads() -> None:
    found = retrieval_scores(knowing(9), TRIALS)
    table = {site.layer: site.scores for site in found.scores.sites.values()}
    ranked = sorted((-score, layer, head) for layer, scores in table.items() for head, score in enumerate(scores))
    wanted: dict[int, list[int]] = {}
    for _, layer, head in sorted(ranked[:3], key=lambda one: one[1:]):
        wanted.setdefault(layer, []).append(head)
    heads = found.highest(3)
    assert {layer: list(some) for layer, some in heads.heads.items()} == wanted
    for variant in ("decore", "heads"):
        patchattn.patch_model(knowing(9), variant, heads=heads.to_dict())
    with pytest.raises(ValueError, match="No head scores above 5"):
        found.highest(threshold=5.0)
    with pytest.raises(ValueError, match="from 1 to 8, got 9"):
        found.highest(9)
    with pytest.raises(ValueError, match="either count or threshold"):
        found.highest()


def test_gates_for_duo_are_the_best_of_a_group() -> None:
    scores = {
        f"layers.{layer}.attn": SiteScores(layer, 2, some)
        for layer, some in ((1, (0.0, 0.2, 1.4, 0.1)), (0, (0.3, 0.1, 0.0, 0.05)))
    }
    found = RetrievalScores(HeadImportance(scores, "retrieval", BaseFacts("llama", 2, 4)), 1, 1).gates()
    assert found.gates == ((0.3, 0.05), (0.2, 1.0))
    patchattn.patch_model(knowing(9), "duo", gates=found.to_dict())
    uneven = {"a": SiteScores(0, 2, (0.1, 0.2, 0.3))}
    with pytest.raises(ValueError, match="3 query heads on 2 kv heads"):
        RetrievalScores(HeadImportance(uneven, "retrieval", BaseFacts("llama", 1, 3)), 1, 1).gates()


def test_trials_hold_the_answer_in_the_text_and_behind_it() -> None:
    trials = needle_trials(BYTES, lengths=[700, 900], samples=3, seed=1)
    assert [len(trial.tokens) - trial.answer for trial in trials] == [700] * 3 + [900] * 3
    for trial in trials:
        start, stop = trial.needle
        assert trial.tokens[start:stop] == trial.tokens[-trial.answer :]
    assert trials == needle_trials(BYTES, lengths=[700, 900], samples=3, seed=1)
    with pytest.raises(ValueError, match="needle lies in its prompt"):
        RetrievalTrial([1, 2, 3], (1, 3), 1)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = byte_llama(num_hidden_layers=2)
    for part in (model, BYTES):
        part.save_pretrained(tmp_path / "model")
    output, scores, gates, picture = (
        tmp_path / name for name in ("heads.json", "scores.json", "gates.json", "heads.png")
    )
    command = ["calibrate", "retrieval", str(tmp_path / "model"), "--length", "700", "--samples", "2", "--top", "2"]
    command += [
        "--output",
        str(output),
        "--scores",
        str(scores),
        "--gates",
        str(gates),
        "--plot",
        str(picture),
        "--device",
        "cpu",
    ]
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    assert ended.value.code == 2
    assert "in none of 2 trials" in capsys.readouterr().err
    assert not output.exists()
    monkeypatch.setattr(retrieval, "_LEAST_ANSWERED", -1.0)
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    assert ended.value.code in (0, None)
    assert "2 of 4 heads, from 2 texts of 2" in capsys.readouterr().out
    patchattn.patch_model(byte_llama(num_hidden_layers=2), "duo", gates=str(gates))
    about = json.loads(output.read_text())["calibration"]
    assert {"lengths": [700], "samples": 2, "counted": 2}.items() <= about.items()
    heads = HeadList.parse(str(output))
    assert heads.base is not None
    assert heads.base.name == "model"
    found = retrieval_scores(model, needle_trials(BYTES, lengths=[700], samples=2))
    assert HeadImportance.load(scores).scores == found.scores.scores
    assert heads.heads == found.highest(2).heads
    assert picture.stat().st_size > 1000
