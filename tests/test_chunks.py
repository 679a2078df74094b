"""Best of chunks against sampling by hand, with whole forwards in place of a kv cache."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import patchattn
from patchattn.core.kv_caches import cache_argument, find_cache
from patchattn.decoding.chunks import BestOfChunks, Chunk, ChunkScore

from .families import FAMILIES
from .reference import tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22], [0, 0, 8, 1, 30]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
EOS = 4


class Judge(ChunkScore):
    """By a function of all ids, the first new place, and what is real of the new tokens."""

    def __init__(self, judged: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
        self.judged = judged

    def score(self, chunk: Chunk) -> torch.Tensor:
        return self.judged(chunk.ids, chunk.ids.shape[1] - chunk.real.shape[1])


def alike(ids: torch.Tensor, start: int) -> torch.Tensor:
    return torch.zeros(len(ids))


def largest(ids: torch.Tensor, start: int) -> torch.Tensor:
    return ids[:, start:].double().mean(-1)


def nucleus(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """The distribution that a token is drawn from: the most likely tokens that hold top_p together."""
    exponentials = np.exp(logits / temperature - (logits / temperature).max())
    shares = exponentials / exponentials.sum()
    order = np.argsort(-shares, kind="stable")
    kept = order[: 1 + int((shares[order].cumsum() < top_p).sum())]
    found = np.zeros_like(shares)
    found[kept] = shares[kept]
    return found / found.sum()


def by_hand(
    model: nn.Module, judged: Any, candidates: int, chunk: int, new: int, temperature: float, top_p: float
) -> torch.Tensor:
    torch.manual_seed(5)
    ids, mask, done = TOKENS, MASK, torch.zeros(2, dtype=torch.bool)
    while ids.shape[1] < TOKENS.shape[1] + new and not bool(done.all()):
        start = ids.shape[1]
        ids, mask, done = (each.repeat_interleave(candidates, dim=0) for each in (ids, mask, done))
        for _ in range(min(chunk, TOKENS.shape[1] + new - start)):
            place = (mask.cumsum(-1) - 1).clamp(min=0)
            with torch.no_grad():
                logits = model(ids, attention_mask=mask, position_ids=place, use_cache=False).logits[:, -1].numpy()
            shares = np.stack([nucleus(row, temperature, top_p) for row in logits])
            tokens = torch.multinomial(torch.from_numpy(shares).float(), 1)[:, 0]
            tokens = torch.where(done, 0, tokens)
            ids, mask = torch.cat([ids, tokens[:, None]], 1), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            done = done | (tokens == EOS)
            if bool(done.all()):
                break
        scores = judged(ids, start).view(2, candidates)
        rows = [
            row * candidates + max(range(candidates), key=lambda one, row=row: (float(scores[row, one]), -one))
            for row in range(2)
        ]
        ids, mask, done = ids[rows], mask[rows], done[rows]
    return ids


def generated(model: nn.Module, new: int = 5, **how: Any) -> torch.Tensor:
    settings = {"max_new_tokens": new, "do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 0}
    torch.manual_seed(5)
    return model.generate(TOKENS, attention_mask=MASK, pad_token_id=0, eos_token_id=EOS, **{**settings, **how})


@pytest.mark.parametrize("chunk", [1, 4])
def test_one_candidate_is_plain_sampling(chunk: int) -> None:
    model = tiny_llama(num_hidden_layers=2)
    plain = generated(model, 9)
    assert torch.equal(
        generated(model, 9, custom_generate=BestOfChunks(Judge(alike), candidates=1, chunk=chunk)), plain
    )
    assert not torch.equal(generated(model, 9, temperature=3.0, top_p=1.0), plain)


PATCHES: list[tuple[str | None, dict[str, Any]]] = [
    (None, {}),
    ("heads", {"rows": "marked", "tokens": [1, 6]}),  # which follows the kv cache
    ("decore", {"heads": [[1, 0]], "rows": "all", "alpha": 2.0}),  # whose second branch does
]


@pytest.mark.parametrize(("variant", "settings"), PATCHES)
@pytest.mark.parametrize("judged", [alike, largest])
def test_every_sequence_keeps_its_own_best(variant: str | None, settings: dict[str, Any], judged: Any) -> None:
    model = tiny_llama(num_hidden_layers=2)
    if variant is not None:
        patchattn.patch_model(model, variant, **settings)
    driver = BestOfChunks(Judge(judged), candidates=3, chunk=3)
    want = by_hand(model, judged, 3, 3, 5, temperature=0.8, top_p=0.9)
    assert torch.equal(generated(model, custom_generate=driver), want)


def test_a_chunk_says_which_of_its_tokens_are_real() -> None:
    """Until the end of the text; a finished sequence waits for the others."""
    model, seen = tiny_llama(num_hidden_layers=2), []

    class See(ChunkScore):
        def score(self, chunk: Chunk) -> torch.Tensor:
            seen.append(chunk)
            return torch.zeros(len(chunk.ids))

    generated(model, 14, custom_generate=BestOfChunks(See(), candidates=2, chunk=4), temperature=4.0, top_p=1.0)
    for chunk in seen:
        count = chunk.real.shape[1]
        for ids, real in zip(chunk.ids.tolist(), chunk.real.tolist(), strict=True):
            ended = [EOS in ids[TOKENS.shape[1] : place] for place in range(len(ids) - count, len(ids))]
            assert real == [not each for each in ended]
    assert any(not bool(chunk.real.all()) for chunk in seen)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"num_beams": 2}, "num_beams=1, got 2"),
        ({"use_cache": False}, "a dynamic kv cache"),
        ({"cache_implementation": "static", "disable_compile": True}, "a dynamic kv cache"),
        ({"return_dict_in_generate": True, "output_scores": True}, "no output_scores"),
        ({"prefill_chunk_size": 2}, "no prefill_chunk_size"),
    ],
)
def test_what_is_refused(how: dict[str, Any], says: str) -> None:
    with pytest.raises(NotImplementedError, match=says):
        generated(tiny_llama(), custom_generate=BestOfChunks(Judge(alike)), **how)


def test_other_models_settings_and_scores_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="decoder-only"):
        FAMILIES["t5"].make().generate(TOKENS, max_new_tokens=2, custom_generate=BestOfChunks(Judge(alike)))
    with pytest.raises(ValueError, match="at least one candidate"):
        BestOfChunks(Judge(alike), candidates=0)
    driver = BestOfChunks(Judge(lambda ids, start: torch.zeros(3)), candidates=2, chunk=2)
    with pytest.raises(ValueError, match="a score of each of 4 candidates"):
        generated(tiny_llama(), custom_generate=driver)
    model = tiny_llama()
    given = cache_argument(model, find_cache(model(TOKENS, attention_mask=MASK, use_cache=True).values()))
    ids, mask = torch.cat([TOKENS, TOKENS], 1), torch.cat([MASK, MASK], 1)
    with pytest.raises(NotImplementedError, match="a new kv cache"):
        model.generate(ids, attention_mask=mask, max_new_tokens=2, custom_generate=BestOfChunks(Judge(alike)), **given)


def test_the_output_is_the_one_that_generate_was_asked_for() -> None:
    driver = BestOfChunks(Judge(alike), candidates=2, chunk=2)
    found = generated(tiny_llama(), custom_generate=driver, return_dict_in_generate=True)
    assert torch.equal(found.sequences, generated(tiny_llama(), custom_generate=driver))
