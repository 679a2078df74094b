"""Lists of key blocks: built, transposed and selected as loops over blocks would."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchattn_kernels import (
    AttentionRule,
    block_means,
    lists_from_mask,
    seen_blocks,
    select_blocks,
    sink_and_recent,
)
from patchattn_kernels.block_lists import mask_from_lists, transposed

seeds = st.integers(0, 2**16)
several = settings(max_examples=30, deadline=None)


def sizes_of(queries: int, keys: int, block_q: int, block_k: int) -> dict[str, int]:
    return {"queries": queries, "keys": keys, "block_q": block_q, "block_k": block_k}


@given(shape=st.tuples(*[st.integers(1, 4)] * 4), seed=seeds)
@several
def test_lists_hold_the_true_entries_in_order(shape: tuple[int, ...], seed: int) -> None:
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    lists = lists_from_mask(mask, 16, 32)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in shape[:3])).view(-1, 3).tolist():
        count = int(lists.counts[tuple(place)])
        assert lists.indices[tuple(place)][:count].tolist() == mask[tuple(place)].nonzero().flatten().tolist()
    assert torch.equal(mask_from_lists(lists, shape[3]), mask)
    back = transposed(lists, shape[3])
    assert torch.equal(mask_from_lists(back, shape[2]), mask.mT)
    assert (back.block_q, back.block_k) == (32, 16)
    short = lists_from_mask(mask, 16, 32, most=int(lists.counts.max()))
    assert torch.equal(mask_from_lists(short, shape[3]), mask)


@given(
    queries=st.integers(1, 20), more=st.integers(0, 9), block_q=st.integers(1, 8), block_k=st.integers(1, 8),
    causal=st.booleans(), window=st.sampled_from([None, 1, 4]), padded=st.booleans(), seed=seeds,
)  # fmt: skip
@several
def test_seen_blocks_hold_every_visible_pair(
    queries: int, more: int, block_q: int, block_k: int, causal: bool, window: int | None, padded: bool, seed: int
) -> None:
    keys = queries + more
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, keys, generator=generator) < 0.6 if padded else None
    rule = AttentionRule(1.0, causal=causal, window=window, mask=mask)
    keep = sink_and_recent([0, 3], [2, 5], 2)
    visible = rule.visible(slice(0, queries), (queries, keys), torch.device("cpu"))[:, None]
    order = (torch.ones(1, keys).bool() if mask is None else mask).cumsum(-1)
    own = torch.arange(queries) + more
    near = (order[:, own, None] - order[:, None]).abs()[:, None] < keep.recent[:, None, None]
    of_window = visible & (near | (order[:, None, None] <= keep.sinks[:, None, None]))
    sizes = sizes_of(queries, keys, block_q, block_k)
    for pairs, given_window in ((visible, None), (of_window, keep)):
        found = seen_blocks(rule, **sizes, device=torch.device("cpu"), window=given_window)
        wanted = torch.zeros(*pairs.shape[:2], -(-queries // block_q), -(-keys // block_k), dtype=torch.bool)
        for i in range(queries):
            for j in range(keys):
                wanted[:, :, i // block_q, j // block_k] |= pairs[:, :, i, j]
        assert not (wanted & ~found).any()
        if mask is None and window is None:
            assert torch.equal(wanted, found.expand_as(wanted))  # no block too many


@given(
    queries=st.integers(1, 24), more=st.integers(0, 20), block_q=st.sampled_from([1, 3, 8]),
    block_k=st.sampled_from([2, 4, 8]), top_k=st.integers(1, 5), seed=seeds,
)  # fmt: skip
@several
def test_the_best_blocks_are_selected(
    queries: int, more: int, block_q: int, block_k: int, top_k: int, seed: int
) -> None:
    keys = queries + more
    shape = (-(-queries // block_q), -(-keys // block_k))
    scores = torch.randn(1, 2, *shape, generator=torch.Generator().manual_seed(seed))
    rule, sizes = AttentionRule(1.0, causal=True), sizes_of(queries, keys, block_q, block_k)
    by_number = mask_from_lists(select_blocks(scores, rule, **sizes, top_k=top_k), shape[1])
    by_share = mask_from_lists(select_blocks(scores, rule, **sizes, top_p=0.7), shape[1])
    for head in range(2):
        for i in range(shape[0]):
            first, last = i * block_q + more, min((i + 1) * block_q, queries) - 1 + more
            seen = {j for j in range(shape[1]) if j * block_k <= last}
            own = {j for j in seen if (j + 1) * block_k > first}
            ranked = sorted(seen, key=lambda j, i=i, h=head: -float(scores[0, h, i, j]))
            others = [j for j in ranked if j not in own][: max(0, top_k - len(own))]
            assert set(by_number[0, head, i].nonzero().flatten().tolist()) == own | set(others)
            powers = [math.exp(float(scores[0, head, i, j])) for j in ranked]
            shares = [sum(powers[:n]) / sum(powers) for n in range(len(ranked))]
            enough = {j for j, before in zip(ranked, shares, strict=True) if before < 0.7 - 1e-6}
            assert set(by_share[0, head, i].nonzero().flatten().tolist()) == own | enough


def test_masked_blocks_are_not_selected() -> None:
    mask = torch.arange(16)[None] >= 8  # the first two blocks are padding
    rule = AttentionRule(1.0, causal=True, mask=mask)
    lists = select_blocks(torch.zeros(1, 1, 4, 4), rule, **sizes_of(16, 16, 4, 4), top_k=4)
    assert lists.counts.flatten().tolist() == [0, 0, 1, 2]
    four = mask[:, None, None].expand(-1, -1, 16, -1) & torch.ones(16, 16).tril().bool()
    lists = select_blocks(torch.zeros(1, 1, 4, 4), AttentionRule(1.0, mask=four), **sizes_of(16, 16, 4, 4), top_k=4)
    assert lists.counts.flatten().tolist() == [0, 0, 1, 2]


@given(keys=st.integers(1, 12), queries=st.integers(1, 5), block_q=st.sampled_from([1, 2]), seed=seeds)
@several
def test_some_of_all_keys_there_were(keys: int, queries: int, block_q: int, seed: int) -> None:
    """Keys of 20 columns, told by their ranks: windows are counted in those, and own blocks found by them."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.stack([torch.randperm(20, generator=generator)[:keys].sort().values for _ in range(2)])
    own = torch.arange(20 - queries, 20)[None]
    rule = AttentionRule(1.0, mask=torch.ones(2, keys).bool(), order=columns[:, None] + 1, own=own + 1)
    keep, sizes = sink_and_recent([2, 0], [3, 1], 2), sizes_of(queries, keys, block_q, 2)
    found = seen_blocks(rule, **sizes, device=torch.device("cpu"), window=keep)
    for b, h, i, j in itertools.product(range(2), range(2), range(queries), range(keys)):
        column, recent = int(columns[b, j]), int(keep.recent[h])
        if column < int(keep.sinks[h]) or abs(column - int(own[0, i])) < recent:
            assert found[b, h, i // block_q, j // 2]
    lists = select_blocks(torch.zeros(2, 1, *found.shape[2:]), rule, **sizes, top_k=1)
    for b, i in itertools.product(range(2), range(queries)):
        place = min(int((columns[b] < own[0, i]).sum()), keys - 1)
        row = lists.indices[b, 0, i // block_q, : int(lists.counts[b, 0, i // block_q])]
        assert place // 2 in row.tolist()


def test_means_of_blocks() -> None:
    tensor = torch.randn(2, 3, 10, 5)
    real = torch.rand(2, 10) < 0.7
    real[0, 4:8] = False
    for mask in (None, real):
        means = block_means(tensor.half(), 4, mask)
        assert means.dtype == torch.float32
        for b in range(2):
            for block in range(3):
                places = [t for t in range(4 * block, min(4 * block + 4, 10)) if mask is None or mask[b, t]]
                wanted = tensor.half()[b, :, places].float().mean(1) if places else torch.zeros(3, 5)
                torch.testing.assert_close(means[b, :, block], wanted)


def test_sizes_of_windows() -> None:
    keep = sink_and_recent([4, 0], [None, 3], 2)
    assert keep.sinks.tolist() == [4, 0]
    assert keep.recent.tolist()[1] == 3
    assert keep.recent[0] >= 2**30
    assert keep.most_sinks == 4
    assert sink_and_recent(2, None, 3).sinks.tolist() == [2, 2, 2]


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="for 2 heads, got 1 and 2"):
        sink_and_recent([1], 4, 2)
    with pytest.raises(ValueError, match="recent >= 1"):
        sink_and_recent(1, 0, 2)
    with pytest.raises(ValueError, match="sinks >= 0"):
        sink_and_recent(-1, 4, 2)
    with pytest.raises(ValueError, match="bool mask"):
        lists_from_mask(torch.ones(1, 1, 2, 2), 16, 16)
    with pytest.raises(ValueError, match="at least 1"):
        lists_from_mask(torch.ones(1, 1, 2, 2).bool(), 0, 16)
    rule, scores = AttentionRule(1.0), torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"\(B, H, 2, 3\)"):
        select_blocks(scores, rule, **sizes_of(8, 12, 4, 4), top_k=1)
    with pytest.raises(ValueError, match="one of top_k and top_p"):
        select_blocks(scores, rule, **sizes_of(8, 8, 4, 4))
    with pytest.raises(ValueError, match="top_p <= 1"):
        select_blocks(scores, rule, **sizes_of(8, 8, 4, 4), top_p=1.5)
