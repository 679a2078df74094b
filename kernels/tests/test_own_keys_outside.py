"""Queries whose own keys are not among the keys, before the first or after the last one."""

import math

import pytest
import torch

from patchattn_kernels import AttentionRule, routed_attention, selected_attention


@pytest.mark.parametrize("offset", [-3, 0, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_windows_reach_as_far_as_their_own_keys_say(offset: int, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All places beyond the keys count, those of padding do not."""
    monkeypatch.setenv("PATCHATTN_KERNELS", "reference")
    queries, keys, window = 5, 6, 3
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 8, generator=generator) for n in (queries, keys, keys))
    real = [True, True, False, True, True, True] if masked else [True] * keys
    rule = AttentionRule(0.5, mask=torch.tensor([real]) if masked else None, offset=offset, window=window)
    seen = torch.zeros(queries, keys, dtype=torch.bool)
    for i in range(queries):
        for j in range(keys):
            low, high = sorted((i + offset, j))
            between = sum(real[place] if 0 <= place < keys else True for place in range(low + 1, high + 1))
            seen[i, j] = real[j] and between < window
    assert rule.visible(slice(0, queries), (queries, keys), torch.device("cpu"))[0].equal(seen)

    logits = (query.double() @ key.double().mT * 0.5).masked_fill(~seen, -math.inf)
    blind = ~seen.any(-1)
    wanted = logits.masked_fill(blind[:, None], 0.0).softmax(-1).masked_fill(blind[:, None], 0.0) @ value.double()
    gate, pages = torch.ones(1, queries, 2), torch.arange(keys)[None, None]
    for got in (
        routed_attention(query, key, value, gate, rule),
        selected_attention(query, key, value, pages, torch.tensor([[keys]]), 1, rule)[0],
    ):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offset", [-1, 3])
def test_packed_sequences_are_not_known_beyond_the_keys(offset: int) -> None:
    rule = AttentionRule(1.0, sequence=torch.tensor([0, 0, 1, 1]), offset=offset)
    with pytest.raises(ValueError, match="among the 4 keys"):
        rule.visible(slice(0, 2), (2, 4), torch.device("cpu"))
