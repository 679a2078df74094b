"""Lookback ratios against loops over attention weights of the model itself, the probe against scikit-learn."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import patchattn
from patchattn.decoding.chunks import BestOfChunks, Chunk, ChunkScore
from patchattn.inspection.lookback import LookbackProbe, LookbackScore, lookback_ratios, lookback_windows

from .reference import HEADS, tiny_llama
from .test_chunks import MASK, TOKENS, by_hand, generated

LAYERS = 2
LONG = torch.tensor([[3, 7, 1, 9, 22, 5, 13, 2, 8], [2, 8, 8, 1, 30, 4, 6, 11, 0]])
CONTEXT, ANSWER = [(1, 4), (0, 3)], [3, 2]


def ratio(row: list[float], context: tuple[int, int]) -> float:
    """Of one row of attention over the real tokens: mean over the context, over it and the mean over what is later."""
    back, new = row[context[0] : context[1]], row[context[1] :]
    x, y = sum(back) / len(back), sum(new) / len(new) if new else 0.0
    return x / (x + y)


def of_one(model: nn.Module, ids: torch.Tensor, context: tuple[int, int], answer: int) -> torch.Tensor:
    """`(n, L, H)` of one text without padding, from the weights that the model returns."""
    with torch.no_grad():
        weights = model(ids[None], output_attentions=True).attentions
    rows = range(len(ids) - answer - 1, len(ids) - 1)
    table = [
        [[ratio(layer[0, head, row, : row + 1].tolist(), context) for head in range(HEADS)] for layer in weights]
        for row in rows
    ]
    return torch.tensor(table, dtype=torch.float64)


def test_the_papers_mean_is_of_each_part() -> None:
    """Five tokens of the context and two new ones with half of the attention each: .1 / .35."""
    assert ratio([0.1] * 5 + [0.25] * 2, (0, 5)) == pytest.approx(0.2857, abs=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_ratios_of_a_padded_batch(side: str, implementation: str) -> None:
    model = tiny_llama(num_hidden_layers=LAYERS, attn_implementation=implementation)
    eager = tiny_llama(num_hidden_layers=LAYERS, attn_implementation="eager")
    real = [9, 7]
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    for row, count in enumerate(real):
        place = slice(9 - count, 9) if side == "left" else slice(0, count)
        ids[row, place], mask[row, place] = LONG[row, :count], 1
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
    found = lookback_ratios(model, given, context=CONTEXT, answer=ANSWER)
    for row, count in enumerate(real):
        want = of_one(eager, LONG[row, :count], CONTEXT[row], ANSWER[row])
        torch.testing.assert_close(found[row].double(), want, rtol=0, atol=1e-6)


def test_an_answer_right_behind_the_context() -> None:
    """Nothing is later than the context at the first token: all attention looks back."""
    model = tiny_llama(num_hidden_layers=LAYERS)
    (found,) = lookback_ratios(model, {"input_ids": LONG[:1]}, context=[(0, 6)], answer=[3])
    torch.testing.assert_close(found[0], torch.ones(LAYERS, HEADS).to(found), rtol=0, atol=1e-12)
    assert bool((found[1:] < 1).all())


def test_windows_are_means() -> None:
    ratios = torch.rand(5, LAYERS, HEADS, generator=torch.Generator().manual_seed(0)).double()
    flat = ratios.reshape(5, LAYERS * HEADS).numpy()
    np.testing.assert_allclose(lookback_windows(ratios).numpy(), [flat.mean(0)], rtol=1e-12)
    want = [flat[start : start + 2].mean(0) for start in range(4)]
    np.testing.assert_allclose(lookback_windows(ratios, 2).numpy(), want, rtol=1e-12)
    with pytest.raises(ValueError, match="1 to 5 tokens"):
        lookback_windows(ratios, 6)


def drawn_probe(model: nn.Module, seed: int = 0) -> LookbackProbe:
    generator = torch.Generator().manual_seed(seed)
    features = torch.rand(40, LAYERS * HEADS, generator=generator)
    labels = (features[:, 1] + 0.3 * torch.rand(40, generator=generator) > 0.6).long()
    return LookbackProbe.fit(model, features, labels, regularisation=100.0)


def test_the_probe_is_scikit_learns(tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    model = tiny_llama(num_hidden_layers=LAYERS)
    generator = torch.Generator().manual_seed(3)
    features = torch.rand(30, LAYERS * HEADS, generator=generator)
    labels = torch.randint(0, 2, (30,), generator=generator)
    probe = LookbackProbe.fit(model, features, labels)
    theirs = LogisticRegression(max_iter=1000).fit(features.double().numpy(), labels.numpy())
    want = theirs.predict_proba(features.double().numpy())[:, 1]
    np.testing.assert_allclose(probe.probability(features).numpy(), want, rtol=1e-10)
    probe.save(tmp_path / "probe.json", texts=30)
    assert LookbackProbe.load(tmp_path / "probe.json") == probe
    assert json.loads((tmp_path / "probe.json").read_text())["base"]["layers"] == LAYERS


def test_what_a_file_may_not_hold(tmp_path: Path) -> None:
    good = {"weights": [[0.0] * HEADS] * LAYERS, "bias": 0.5}
    good["base"] = {"model_type": "llama", "layers": LAYERS, "heads": HEADS}
    path = tmp_path / "probe.json"
    for change, says in (
        ({"weights": [[0.0] * HEADS]}, "2 lists of 4 weights"),
        ({"weights": [["1"] * HEADS] * LAYERS}, "are numbers"),
        ({"bias": float("nan")}, "not finite"),
        ({"code": "x"}, "has the fields"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises((TypeError, ValueError), match=says):
            LookbackProbe.load(path)


class Keep(LookbackScore):
    """Guided decoding that keeps what it looked at."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.chunks: list[Chunk] = []

    def score(self, chunk: Chunk) -> torch.Tensor:
        self.chunks.append(chunk)
        return super().score(chunk)


def test_what_is_seen_while_decoding_is_what_the_whole_text_says() -> None:
    model = tiny_llama(num_hidden_layers=LAYERS)
    context = [(0, 3), (0, 2)]
    score = Keep(drawn_probe(model), context)
    generated(model, custom_generate=BestOfChunks(score, candidates=2, chunk=3))
    eager = tiny_llama(num_hidden_layers=LAYERS, attn_implementation="eager")
    for chunk in score.chunks:
        count = chunk.real.shape[1]
        for row, (ids, real) in enumerate(zip(chunk.ids, chunk.real, strict=True)):
            text = ids[2:] if row >= 2 else ids  # left padding of the second sequence
            want = of_one(eager, text, context[row // 2], count).flatten(1)
            torch.testing.assert_close(chunk.looks[row][real].double(), want[real], rtol=0, atol=1e-6)


def test_guided_decoding_keeps_the_most_likely_chunk() -> None:
    """Against sampling by hand, each chunk judged by a forward over all of the text."""
    model = tiny_llama(num_hidden_layers=LAYERS)
    eager = tiny_llama(num_hidden_layers=LAYERS, attn_implementation="eager")
    probe, context = drawn_probe(model), [(0, 3), (0, 2)]
    weights = np.array(probe.weights).ravel()

    def judged(ids: torch.Tensor, start: int) -> torch.Tensor:
        scores = []
        for row, one in enumerate(ids):
            text = one[2:] if row >= len(ids) // 2 else one
            ends = [place for place in range(start, len(one)) if 4 in one[TOKENS.shape[1] : place].tolist()]
            table = of_one(eager, text, context[row * 2 // len(ids)], len(one) - start).flatten(1).numpy()
            table = table[: len(table) - len(ends)]
            scores.append(1 / (1 + np.exp(-(table.mean(0) @ weights + probe.bias))) if len(table) else 0.0)
        return torch.tensor(scores)

    want = by_hand(model, judged, 3, 3, 5, temperature=0.8, top_p=0.9)
    driver = BestOfChunks(LookbackScore(probe, context), candidates=3, chunk=3)
    assert torch.equal(generated(model, custom_generate=driver), want)
    first = BestOfChunks(ChunkOfZeros(), candidates=3, chunk=3)
    assert not torch.equal(generated(model, custom_generate=first), want)


class ChunkOfZeros(ChunkScore):
    def score(self, chunk: Chunk) -> torch.Tensor:
        return torch.zeros(len(chunk.ids))


def test_one_candidate_is_plain_sampling() -> None:
    model = tiny_llama(num_hidden_layers=LAYERS)
    score = LookbackScore(drawn_probe(model), [(0, 2)] * 2)
    assert torch.equal(generated(model, custom_generate=BestOfChunks(score, candidates=1)), generated(model))
    with patchattn.patched(model, "decore", heads=[[1, 0]], alpha=2.0):  # whose second branch is not looked at
        assert torch.equal(generated(model, custom_generate=BestOfChunks(score, candidates=1)), generated(model))
    with pytest.raises(ValueError, match="3 contexts for a batch of 2"):
        generated(model, custom_generate=BestOfChunks(LookbackScore(drawn_probe(model), [(0, 2)] * 3), candidates=1))


def test_what_is_refused() -> None:
    model = tiny_llama(num_hidden_layers=LAYERS)
    given = {"input_ids": TOKENS, "attention_mask": MASK}
    with pytest.raises(ValueError, match="Sequence 1 has 3 tokens"):
        lookback_ratios(model, given, context=[(0, 2), (0, 3)], answer=[1, 1])
    with pytest.raises(ValueError, match="1 contexts and 2 answers"):
        lookback_ratios(model, given, context=[(0, 2)], answer=[1, 1])
    with pytest.raises(ValueError, match="evaluation mode"):
        lookback_ratios(model.train(), given, context=[(0, 2)] * 2, answer=[1, 1])
    model.eval()
    with pytest.raises(ValueError, match="Expected 8 features"):
        LookbackProbe.fit(model, torch.zeros(4, 3), [0, 1, 0, 1])
    with pytest.raises(ValueError, match="both there"):
        LookbackProbe.fit(model, torch.zeros(4, 8), [1, 1, 1, 1])
    driver = BestOfChunks(LookbackScore(drawn_probe(model), [(0, 2)] * 2))
    deeper = tiny_llama(num_hidden_layers=LAYERS + 1)
    with pytest.raises(ValueError, match="This lookback probe is for"):
        generated(deeper, custom_generate=driver)
