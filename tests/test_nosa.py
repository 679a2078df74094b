"""NOSA (arXiv 2510.13602) against loops in float64: blocks chosen by queries, then by values, with biases."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

import patchattn

from .behaviour import close, decoded, positions, text
from .families import FAMILIES, outputs
from .reference import DIM, HEADS, KV_HEADS, layer_in_and_out, tiny_llama
from .selecting import projected

TOKENS = torch.arange(3, 43)[None]
SMALL = {"block": 4, "first": 1, "local": 2, "aware": 4, "top_k": 6, "length": 4, "stride": 2}
GROUP = HEADS // KV_HEADS


def patched(**settings: Any) -> torch.nn.Module:
    model = patchattn.patch_model(tiny_llama(), "nosa", **{**SMALL, **settings})
    nosa = model.model.layers[0].self_attn.patchattn.nosa
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        nosa.weight.copy_(torch.randn(nosa.weight.shape, generator=generator, dtype=torch.float64))
        nosa.scale.copy_(torch.tensor([0.4, -0.7]))
    return model


def softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max())
    return shares / shares.sum()


def best(scores: dict[int, float], chosen: set[int], count: int) -> set[int]:
    """What was chosen, and the best others, `count` in all; of equal ones the first."""
    others = sorted((p for p in scores if p not in chosen), key=lambda p: (-scores[p], p))
    return chosen | set(others[: count - len(chosen)])


def chosen(query: np.ndarray, key: np.ndarray, score: np.ndarray, i: int, settings: dict[str, int]) -> set[int]:
    """Blocks that token i reads in a kv head, of its queries `(r, D)`, keys `(T, D)` and scores `(T,)` there."""
    block, length = settings["block"], settings["length"]
    own = i // block
    starts = [s for s in range(0, i + 1, settings["stride"]) if s + length - 1 <= i]
    means = np.array([key[s : s + length].mean(axis=0) for s in starts])
    weights = sum(softmax(means @ one / np.sqrt(DIM)) for one in query) if starts else []
    shared = {
        p: [n for n, s in enumerate(starts) if s // block <= p <= (s + length - 1) // block] for p in range(own + 1)
    }
    aware = best(
        {p: max((weights[n] for n in windows), default=0.0) for p, windows in shared.items()},
        {p for p in shared if p < settings["first"] or p > own - settings["local"]},
        settings["aware"],
    )
    mean = [score[s : s + length].mean() for s in starts]
    return best(
        {p: max((mean[n] for n in windows), default=-np.inf) for p, windows in shared.items()}, aware, settings["top_k"]
    )


@pytest.mark.parametrize("changes", [{}, {"length": 2, "local": 1, "aware": 2, "top_k": 5}, {"aware": 6, "block": 2}])
def test_blocks_are_chosen_by_queries_and_by_values_whose_scores_are_on_the_logits(changes: dict[str, int]) -> None:
    settings = {**SMALL, **changes}
    model = patched(**changes)
    inputs, got = layer_in_and_out(model, TOKENS)
    module = model.model.layers[0].self_attn
    weight, scale = (getattr(module.patchattn.nosa, name).detach().numpy() for name in ("weight", "scale"))
    query, key, value = projected(module, inputs[0])
    score = scale[:, None] * np.log1p(np.exp(weight @ value.reshape(len(value), -1).T))
    want = []
    for i in range(len(query)):
        heads = []
        for head in range(HEADS):
            kv = head // GROUP
            blocks = chosen(query[i, kv * GROUP : (kv + 1) * GROUP], key[:, kv], score[kv], i, settings)
            read = [j for j in range(i + 1) if j // settings["block"] in blocks]
            heads.append(softmax(key[read, kv] @ query[i, head] / np.sqrt(DIM) + score[kv, read]) @ value[read, kv])
        want.append(module.o_proj.weight.detach().numpy() @ np.concatenate(heads))
    np.testing.assert_allclose(got[0], np.array(want), rtol=1e-6, atol=1e-8)


def test_calls_of_any_size_a_static_cache_and_padding_of_whole_blocks_agree() -> None:
    model = patched()
    whole = outputs(model, input_ids=TOKENS)[0]
    close(decoded(model, TOKENS, [21, 1, 1, 5, 1, 1, 10]), whole)
    small = patched(block=1, length=1, stride=1, local=1, aware=3, top_k=5)
    close(decoded(small, TOKENS[:, :15], [13, 1, 1], kind="static"), outputs(small, input_ids=TOKENS[:, :15])[0])
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :8] = 0
    together = outputs(model, input_ids=TOKENS.repeat(2, 1), attention_mask=mask, position_ids=positions(mask))[0]
    close(together[:1], whole)
    close(together[1:, 8:], outputs(model, input_ids=TOKENS[:, 8:])[0])


def test_an_untrained_one_is_the_base_where_everything_fits() -> None:
    model, tokens = FAMILIES["llama"].make(), text(12)
    expected, cached = outputs(model, input_ids=tokens)[0], decoded(model, tokens, [9, 1, 2])
    small = {**SMALL, "block": 2}
    for settings in (small, {**small, "top_k": None}):
        with patchattn.patched(model, "nosa", **settings):
            assert torch.equal(outputs(model, input_ids=tokens)[0], expected)
            assert torch.equal(decoded(model, tokens, [9, 1, 2]), cached)
    with patchattn.patched(model, "nosa", **{**small, "top_k": 4}):
        assert not torch.equal(outputs(model, input_ids=tokens)[0], expected)


def test_the_hit_rate_is_the_share_of_blocks_that_the_token_before_has_read() -> None:
    model, found = patched(), []
    with patchattn.observe(model, lambda observation: found.append(observation.values)):
        decoded(model, TOKENS, [38, 1, 1])
    rates = torch.cat([values["hit_rate"] for values in found if "hit_rate" in values], dim=1)[0]
    model = patched()
    inputs, _ = layer_in_and_out(model, TOKENS)
    module = model.model.layers[0].self_attn
    weight, scale = (getattr(module.patchattn.nosa, name).detach().numpy() for name in ("weight", "scale"))
    query, key, value = projected(module, inputs[0])
    score = scale[:, None] * np.log1p(np.exp(weight @ value.reshape(len(value), -1).T))
    for kv in range(KV_HEADS):
        blocks = [chosen(query[i, kv * 2 : kv * 2 + 2], key[:, kv], score[kv], i, SMALL) for i in range(40)]
        want = [len(now & before) / len(now) for before, now in pairwise(blocks)]
        assert rates[1:, kv].tolist() == pytest.approx(want)
        assert bool(rates[0, kv].isnan())


def test_scores_learn_from_the_first_step() -> None:
    model = patchattn.patch_model(tiny_llama(), "nosa", **SMALL)
    nosa = model.model.layers[0].self_attn.patchattn.nosa
    assert nosa.fast_parameters() == [nosa.scale]
    (model(TOKENS).logits * torch.linspace(-1, 1, 50)).sum().backward()
    assert bool((nosa.scale.grad != 0).all())


def test_numbers_of_blocks_that_do_not_fit_are_refused() -> None:
    for settings in ({"aware": 17}, {"top_k": 32}, {"top_k": None, "aware": 10}):
        with pytest.raises(ValueError, match="first \\+ local <= aware <= top_k"):
            patchattn.patch_model(tiny_llama(), "nosa", **settings)
