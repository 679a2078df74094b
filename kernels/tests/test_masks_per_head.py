"""Masks that differ between heads, and numbers that hide keys, against loops in float64."""

from typing import Any

import numpy as np
import pytest
import torch

from patchattn_kernels import (
    AttentionRule,
    attention_with_lse,
    block_sparse_attention,
    column_mass,
    key_counts,
    lists_from_mask,
    routed_attention,
    seen_blocks,
    select_blocks,
    sink_and_recent,
    split_attention,
)
from patchattn_kernels.rows import seen_by

BATCH, HEADS, GROUPS, QUERIES, KEYS, DIM = 2, 4, 2, 6, 9, 5
CPU = torch.device("cpu")


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


QUERY, KEY = random(BATCH, HEADS, QUERIES, DIM, seed=0), random(BATCH, GROUPS, KEYS, DIM, seed=1)
VALUE = random(BATCH, GROUPS, KEYS, DIM, seed=2)
SHOWN = random(BATCH, HEADS, QUERIES, KEYS, seed=3) > -0.5
SHOWN[..., 7] = False  # shown to no query of any head
SHOWN[1, 2, 4] = False  # a row of one head that sees nothing
BIAS = random(BATCH, HEADS, QUERIES, KEYS, seed=4)
MASKS = {"bool": SHOWN, "added": BIAS.masked_fill(~SHOWN, -1e4), "one batch": SHOWN[:1]}


def rule_of(kind: str) -> tuple[AttentionRule, np.ndarray, np.ndarray]:
    """The rule, what it shows `(B, H, Tq, Tk)` and what it adds to logits."""
    shown = SHOWN[:1].expand(BATCH, -1, -1, -1) if kind == "one batch" else SHOWN
    added = BIAS if kind == "added" else torch.zeros_like(BIAS)
    return AttentionRule(0.7, mask=MASKS[kind]), shown.numpy(), added.numpy()


def weights_of(shown: np.ndarray, added: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights and log-sum-exp, pair by pair."""
    weights, lse = np.zeros(shown.shape), np.full(shown.shape[:3], -np.inf)
    for b, h, i in np.ndindex(BATCH, HEADS, QUERIES):
        seen = [j for j in range(KEYS) if shown[b, h, i, j]]
        keys = KEY[b, h // (HEADS // GROUPS)]
        powers = [np.exp(0.7 * float(QUERY[b, h, i] @ keys[j]) + added[b, h, i, j]) for j in seen]
        if seen:
            weights[b, h, i, seen], lse[b, h, i] = np.array(powers) / sum(powers), np.log(sum(powers))
    return weights, lse


def times_values(weights: np.ndarray) -> np.ndarray:
    return weights @ np.repeat(VALUE.numpy(), HEADS // GROUPS, axis=1)


def close(got: torch.Tensor, want: np.ndarray) -> None:
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", MASKS)
def test_attention_and_what_keys_receive(kind: str) -> None:
    rule, shown, added = rule_of(kind)
    weights, lse = weights_of(shown, added)
    output, sums = attention_with_lse(QUERY, KEY, VALUE, rule)
    close(output, times_values(weights))
    close(sums, lse)
    mass, _ = column_mass(QUERY, KEY, rule)
    close(mass, weights.sum(2))
    gate = (random(BATCH, QUERIES, HEADS, seed=5) > 0).double()
    close(routed_attention(QUERY, KEY, VALUE, gate, rule), times_values(weights) * gate.mT[..., None].numpy())
    chosen = random(BATCH, HEADS, KEYS, seed=6) > 0
    for known in ({}, {"lse": sums}, {"lse": sums, "output": output}):
        split = split_attention(QUERY, KEY, VALUE, chosen, rule, **known)
        close(split.part, times_values(weights * chosen[:, :, None].numpy()))
        close(split.mass, (weights * chosen[:, :, None].numpy()).sum(-1))
        close(split.output, times_values(weights))


@pytest.mark.parametrize("real", [None, random(BATCH, QUERIES, seed=7) > -1])
@pytest.mark.parametrize("kind", MASKS)
def test_counts_of_keys(kind: str, real: torch.Tensor | None) -> None:
    rule, shown, _ = rule_of(kind)
    counts = key_counts(rule, QUERIES, KEYS, CPU, real)
    for b, h, j in np.ndindex(BATCH, HEADS, KEYS):
        seeing = [i for i in range(QUERIES) if shown[b, h, i, j] and (real is None or real[b, i])]
        at = (min(b, len(counts.rows) - 1), h, j)
        assert counts.rows[at] == len(seeing)
        assert counts.longest[at] == max((shown[b, h, i].sum() for i in seeing), default=0)
        assert counts.first[at] == (bool(seeing) and not any(shown[b, h, i, :j].any() for i in seeing))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("kept", ["window", "lists"])
def test_block_sparse_attention(kept: str, kind: str) -> None:
    rule, shown, added = rule_of(kind)
    if kept == "window":
        sinks, recent = [1, 0, 2, 1], [2, 3, 1, 4]
        keep: Any = sink_and_recent(sinks, recent, HEADS)
        real = shown.any((1, 2))  # of any head: whether a key is padding is no matter of heads
        order = real.cumsum(-1)
        stays = np.zeros(shown.shape, dtype=bool)
        for b, h, i, j in np.ndindex(*shown.shape):
            own = i + KEYS - QUERIES
            stays[b, h, i, j] = order[b, j] <= sinks[h] or abs(order[b, own] - order[b, j]) < recent[h]
    else:
        blocks = random(BATCH, HEADS, 3, 3, seed=8) > -0.3
        keep = lists_from_mask(blocks, 2, 4)
        stays = blocks.numpy().repeat(2, axis=2).repeat(4, axis=3)[..., :KEYS]
    weights, lse = weights_of(shown & stays, added)
    output, sums = block_sparse_attention(QUERY, KEY, VALUE, keep, rule, return_lse=True)
    close(output, times_values(weights))
    close(sums, lse)


def test_blocks_that_heads_see() -> None:
    rule, shown, _ = rule_of("bool")
    sizes = {"queries": QUERIES, "keys": KEYS, "block_q": 2, "block_k": 4}
    found = seen_blocks(rule, **sizes, device=CPU)
    for b, h, i, j in np.ndindex(BATCH, HEADS, 3, 3):
        assert found[b, h, i, j] == shown[b, h, 2 * i : 2 * i + 2, 4 * j : 4 * j + 4].any()
    lists = select_blocks(random(BATCH, HEADS, 3, 3, seed=9), rule, **sizes, top_k=2)
    for b, h, i in np.ndindex(BATCH, HEADS, 3):
        assert all(found[b, h, i, j] for j in lists.indices[b, h, i, : lists.counts[b, h, i]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_that_hide_a_key_leave_it_no_weight_and_biases_do_not_hide_it(dtype: torch.dtype) -> None:
    lowest = torch.finfo(dtype).min
    hiding = torch.tensor([lowest, lowest / 2, torch.finfo(torch.float16).min, -1e4, -torch.inf], dtype=dtype)
    assert not seen_by(hiding).any()
    wide = torch.float64 if dtype == torch.float64 else torch.float32  # of the softmax
    for number in [*hiding.to(wide), torch.tensor(-1e9, dtype=wide)]:
        assert not seen_by(number)
        logits = torch.stack([torch.tensor(0.0, dtype=wide), torch.tensor(4000.0, dtype=wide) + number])
        assert logits.softmax(0)[1] == 0
    slopes, length = 2.0 ** -torch.arange(1, 9).to(dtype), 4096
    alibi = -slopes[:, None] * torch.arange(length, dtype=dtype)
    assert seen_by(alibi).all()
