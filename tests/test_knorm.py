"""Knorm: the kept keys are those of smallest norm, found by a loop in float64."""

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import patchattn
from patchattn.reading import eviction, groups

from .behaviour import decoded
from .evictions import extended, kept_by_loops, padded, registered, watched
from .reference import tiny_llama

PROMPT = [12]


@pytest.mark.parametrize("sizes", [[12], [5, 7]])
@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"budget": 6}, lambda layer, head, real: 6),
        ({"budget": [5, [4, 7]]}, lambda layer, head, real: [[5, 5], [4, 7]][layer][head]),
        ({"compression_ratio": 0.4}, lambda layer, head, real: real * 6 // 10),
    ],
)
def test_the_smallest_are_kept(settings: dict[str, Any], count: Any, sizes: list[int]) -> None:
    ids, real = padded()
    ids, real = torch.cat([ids, ids.clamp(min=3)[:, :1]], dim=1), extended(real, 13)
    with registered():
        _, layers, _ = watched("knorm", settings, ids, real, [*sizes, 1])
    for number, calls in enumerate(layers):
        norms = calls[-1]["key"][:, :, :12].square().sum(-1).sqrt()
        for row in range(3):
            for head in range(2):
                wanted = count(number, head, int(real[row, :12].sum()))
                expected = kept_by_loops((-norms[row, head]).tolist(), real[row, :12].tolist(), wanted)
                for query_head in (2 * head, 2 * head + 1):
                    assert calls[-1]["seen"][row, query_head, 0].nonzero()[:, 0].tolist() == [*expected, 12]


def test_after_every_call_the_worst_goes() -> None:
    ids, real = padded()
    ids, real = ids[:1].repeat(1, 2), torch.ones(1, 24, dtype=torch.bool)
    with registered():
        _, layers, cache = watched("knorm", {"budget": 5, "event": "call"}, ids, real, [12, *[1] * 12])
    for calls, layer in zip(layers, cache.layers, strict=True):
        new = torch.cat([call["key"][:, :, -call["query"].shape[2] :] for call in calls], dim=2)
        for head in range(2):
            norms, held = (-new[0, head].norm(dim=-1)).tolist(), []
            for call, (start, end) in zip(calls, [(0, 12), *((n, n + 1) for n in range(12, 24))], strict=True):
                held = sorted([*held, *range(start, end)])
                assert call["seen"][0, 2 * head, -1].nonzero()[:, 0].tolist() == held
                held = [held[place] for place in kept_by_loops([norms[key] for key in held], [True] * len(held), 5)]
            assert layer.columns()[0, head].tolist()[-5:] == held
        assert layer.keys.shape[2] == 5


def test_a_token_attends_to_what_is_left_by_kv_head_and_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how: Any) -> torch.Tensor:
        given.append((query.shape, key.shape, how["attn_mask"]))
        return scaled_dot_product_attention(query, key, value, **how)

    model, tokens = tiny_llama(), torch.arange(16)[None] + 3
    patchattn.patch_model(model, "knorm", budget=6)
    monkeypatch.setattr(groups.F, "scaled_dot_product_attention", attended)
    found = decoded(model, tokens, [12, 1, 1, 1, 1])
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    # the first token still hides what is dropped behind it
    assert [key[2] for query, key, mask in given if query[2] == heads // kv_heads and mask is None] == [8, 9, 10]
    monkeypatch.setattr(eviction, "attended_by_groups", lambda call: None)
    torch.testing.assert_close(found, decoded(model, tokens, [12, 1, 1, 1, 1]), rtol=1e-5, atol=1e-5)
