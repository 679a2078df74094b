"""Expected Attention against its formulas in float64: every rotation a matrix, every expectation a sum."""

from pathlib import Path

import numpy as np
import pytest
import torch

import patchattn

from .evictions import extended, kept_by_loops, padded, registered, watched
from .families import FAMILIES

DIM, THETA, FUTURE = 8, 10000.0, 16


def rotation(position: int) -> np.ndarray:
    """`(D, D)` of Llama: pairs (c, c + D/2)."""
    matrix = np.zeros((DIM, DIM))
    for pair in range(DIM // 2):
        angle, other = position / THETA ** (2 * pair / DIM), pair + DIM // 2
        matrix[pair, pair] = matrix[other, other] = np.cos(angle)
        matrix[pair, other], matrix[other, pair] = -np.sin(angle), np.sin(angle)
    return matrix


def expected(
    queries: list[np.ndarray], keys: np.ndarray, values: np.ndarray, *, seen: int, sinks: int, epsilon: float
) -> list[float]:
    """Scores of the keys `(n, D)` of one kv head, by the rotated queries `(T, D)` of each of its query heads.

    Args:
        queries: of the tokens from the first on, each rotated by its number.
        keys: rotated.
        values: likewise.
        seen: number of tokens so far.
        sinks: as the setting.
        epsilon: as the setting.
    """
    mean_rotation = sum(rotation(seen + step) for step in range(FUTURE)) / FUTURE
    weights = []
    for rows in queries:
        plain = [rotation(-place) @ row for place, row in enumerate(rows) if place >= sinks]
        mean = sum(plain) / len(plain)
        covariance = sum(np.outer(row - mean, row - mean) for row in plain) / len(plain)
        mean, covariance = mean_rotation @ mean, mean_rotation @ covariance @ mean_rotation.T
        logits = [mean @ key / DIM**0.5 + key @ covariance @ key / (2 * DIM) for key in keys[sinks:]]
        exponentials = np.exp(np.array(logits) - max(logits))
        weights.append(exponentials / exponentials.sum())
    mixed = (sum(weights) / len(weights) + epsilon) * np.linalg.norm(values[sinks:], axis=-1)
    return [np.inf] * sinks + [float(score) for score in mixed]


@pytest.mark.parametrize(
    ("event", "sizes", "sinks", "epsilon"),
    [("prompt", [12], 4, 0.0), ("prompt", [7, 5], 2, 0.05), ("chunk", [12], 0, 0.0)],
)
def test_the_set_after_the_prompt(event: str, sizes: list[int], sinks: int, epsilon: float) -> None:
    ids, real = padded()
    more = torch.randint(3, 60, (3, 2), generator=torch.Generator().manual_seed(2))
    ids, real = torch.cat([ids, more], dim=1), extended(real, 14)
    settings = {"budget": 6, "event": event, "future": FUTURE, "sinks": sinks, "epsilon": epsilon}
    with registered():
        _, layers, _ = watched("expected_attention", settings, ids, real, [*sizes, 1, 1])
    for calls in layers:
        query = torch.cat([call["query"] for call in calls[: len(sizes)]], dim=2).double().numpy()
        key, value = (calls[len(sizes) - 1][name].double().numpy() for name in ("key", "value"))
        for row in range(3):
            first = 12 - int(real[row, :12].sum())
            for head in range(2):
                own = [query[row, each, first:] for each in (2 * head, 2 * head + 1)]
                scores = expected(
                    own, key[row, head, first:], value[row, head, first:], seen=12 - first, sinks=sinks, epsilon=epsilon
                )
                kept = [first + place for place in kept_by_loops(scores, [True] * len(scores), 6)]
                for call, new in zip(calls[len(sizes) :], ([12], [12, 13]), strict=True):
                    assert call["seen"][row, 2 * head, -1].nonzero()[:, 0].tolist() == [*kept, *new]


def test_the_scores_are_the_formulas() -> None:
    """Not their order alone."""
    model = FAMILIES["llama"].make_exact()
    patchattn.patch_model(model, "expected_attention", budget=6, future=FUTURE)
    variant = model.model.layers[1].self_attn.patchattn.variants()["expected_attention"]
    seen, made = [], type(variant).scores
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(variant),
            "scores",
            lambda self, call, state: seen.append((call, made(self, call, state))) or seen[-1][1],
        )
        with torch.no_grad():
            model(torch.arange(3, 23)[None], use_cache=True)
    call, scores = seen[1]
    query, key, value = (tensor[0].double().numpy() for tensor in (call.query, call.key, call.value))
    for head in range(2):
        wanted = expected(list(query[2 * head : 2 * head + 2]), key[head], value[head], seen=20, sinks=4, epsilon=0.0)
        assert np.isinf(scores[0, head, :4].numpy()).all()
        np.testing.assert_allclose(scores[0, head, 4:].numpy(), wanted[4:], rtol=1e-5)


def test_what_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"expected_attention must know how GPT2Attention .* are learned"):
        patchattn.patch_model(FAMILIES["gpt2"].make(), "expected_attention")
    model = patchattn.patch_model(FAMILIES["llama"].make_exact(), "expected_attention", budget=4)
    with pytest.raises(NotImplementedError, match="no assisted decoding"):
        model.generate(torch.arange(3, 23)[None], prompt_lookup_num_tokens=3, max_new_tokens=8, eos_token_id=None)


def test_how_modules_rotate_is_saved_with_the_patch(tmp_path: Path) -> None:
    model = patchattn.patch_model(FAMILIES["llama"].make(), "expected_attention", budget=6, future=FUTURE)
    model.save_pretrained(tmp_path)
    again = patchattn.from_pretrained(tmp_path)
    ids, how = torch.arange(3, 23)[None], {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(again.generate(ids, **how), model.generate(ids, **how))
