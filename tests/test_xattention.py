"""XAttention (arXiv 2503.16428) against loops over tiles and their antidiagonals."""

import numpy as np
import pytest
import torch
from transformers import StaticCache

import patchattn
from patchattn.core.kv_caches import cache_argument
from patchattn.variants.selection.xattention import enough_blocks
from patchattn_kernels import BlockLists

from .behaviour import decoded, positions, text, variants_in
from .families import FAMILIES, outputs
from .reference import DIM, layer_in_and_out, tiny_llama
from .selecting import Recorded, assert_reads, projected, recorded

TOKENS = torch.arange(3, 26)[None]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    return recorded(monkeypatch)


def blocks_read(
    query: np.ndarray, key: np.ndarray, share: float, stride: int, block: int, first: int = 0
) -> dict[tuple[int, int], set[int]]:
    """Blocks of keys that each head's blocks of queries read, by both numbers.

    Args:
        query: `(T, H, D)`, the last of which is the last of the keys.
        key: `(N, Hkv, D)`.
        share: of the estimated weights.
        stride: side of a tile.
        block: side of a block.
        first: keys before this one are padding.
    """
    keys, group, found = len(key), query.shape[1] // key.shape[1], {}
    start = keys - len(query)
    rows = range(max(start, first), keys)
    for head in range(query.shape[1]):
        mass: dict[tuple[int, int], float] = {}
        for a in sorted({i // stride for i in rows}):
            # a tile counts where a token that is there sees a key of it
            seen = list(range(first // stride, max(i for i in rows if i // stride == a) // stride + 1))
            logits = []
            for b in seen:
                total = 0.0
                for m in range(stride):
                    i, j = (a + 1) * stride - 1 - m, b * stride + m
                    if i in rows and first <= j < keys:
                        total += query[i - start, head] @ key[j, head // group]
                logits.append(total / (np.sqrt(DIM) * stride))
            weights = np.exp(np.array(logits) - max(logits))
            for b, weight in zip(seen, weights / weights.sum(), strict=True):
                place = (a * stride // block, b * stride // block)
                mass[place] = mass.get(place, 0.0) + weight
        for a in {place[0] for place in mass}:
            of_row = {place[1]: weight for place, weight in mass.items() if place[0] == a}
            read = {min(of_row), a}
            total, sum_read = sum(of_row.values()), sum(of_row[b] for b in {min(of_row), a})
            for b in sorted(of_row.keys() - read, key=lambda b: (-of_row[b], b)):
                if sum_read >= share * total:
                    break
                read.add(b)
                sum_read += of_row[b]
            found[head, a] = read
    return found


@pytest.mark.parametrize(
    ("share", "stride", "block"), [(0.5, 1, 1), (0.7, 2, 4), (0.6, 3, 3), (0.5, 1, 3), (0.0, 2, 2), (0.3, 2, 6)]
)
def test_a_prompt_reads_the_blocks_whose_antidiagonals_are_heaviest(share: float, stride: int, block: int) -> None:
    model = patchattn.patch_model(tiny_llama(), "xattention", threshold=share, stride=stride, block=block)
    inputs, _ = layer_in_and_out(model, TOKENS)
    query, key, _ = projected(model.model.layers[0].self_attn, inputs[0])
    read = blocks_read(query, key, share, stride, block)
    sizes = {len(blocks) for blocks in read.values()}
    assert len(sizes) > 1
    assert_reads(model, TOKENS, lambda head, i, j: j // block in read[head, i // block])


def test_each_chunk_estimates_by_its_own_rows_and_single_tokens_are_dense(calls: Recorded) -> None:
    """Chunks that begin inside of a tile and of a block."""
    model = patchattn.patch_model(tiny_llama(), "xattention", threshold=0.5, stride=2, block=4)
    inputs, _ = layer_in_and_out(model, TOKENS)
    query, key, _ = projected(model.model.layers[0].self_attn, inputs[0])
    calls.clear()
    decoded(model, TOKENS, [9, 3, 7, 1, 3])
    done = 0
    for (_, seen, _), size in zip(calls, [9, 3, 7, 1, 3], strict=True):
        read = blocks_read(query[done : done + size], key[: done + size], 0.5, 2, 4)
        for head, row in np.ndindex(4, size):
            i = done + row
            want = {j for j in range(i + 1) if size == 1 or j // 4 in read[head, i // 4]}
            assert set(seen[0, head, row].nonzero().flatten().tolist()) == want
        done += size


def test_padding_inside_a_tile_counts_as_zeros(calls: Recorded) -> None:
    model = patchattn.patch_model(tiny_llama(), "xattention", threshold=0.5, stride=2, block=4)
    mask = torch.ones_like(TOKENS)
    mask[:, :5] = 0
    with torch.no_grad():
        model(TOKENS, attention_mask=mask, position_ids=positions(mask))
    call, seen, _ = calls[0]
    query, key = (tensor[0].transpose(0, 1).numpy() for tensor in (call.query, call.key))
    read = blocks_read(query[5:], key, 0.5, 2, 4, first=5)
    for head, i in np.ndindex(4, 23):
        if i >= 5:
            want = {j for j in range(5, i + 1) if j // 4 in read[head, i // 4]}
            assert set(seen[0, head, i].nonzero().flatten().tolist()) == want


def test_of_equal_blocks_the_first_is_read_and_enough_is_enough() -> None:
    mass = torch.tensor([0.1, 0.2, 0.2, 0.2, 0.2, 0.1])[None, None, None]
    for share, expected in ((0.2, {0, 5}), (0.3, {0, 1, 5}), (0.45, {0, 1, 2, 5}), (0.99, {0, 1, 2, 3, 4, 5})):
        found = enough_blocks(mass.double(), torch.ones(1, 1, 1, 6, dtype=torch.bool), share)
        assert set(found.flatten().nonzero().flatten().tolist()) == expected
    seen = torch.tensor([False, True, True, True, False, False])[None, None, None]
    assert enough_blocks(mass, seen, 0.0).flatten().tolist() == [False, True, False, True, False, False]


def test_all_the_weights_or_two_blocks_are_the_base_bit_for_bit() -> None:
    model, tokens = FAMILIES["llama"].make(), text(12)
    expected, cached = outputs(model, input_ids=tokens)[0], decoded(model, tokens, [9, 1, 2])
    for settings in ({"threshold": 1.0, "block": 2}, {"threshold": 0.0, "block": 6}):
        with patchattn.patched(model, "xattention", stride=2, **settings):
            assert torch.equal(outputs(model, input_ids=tokens)[0], expected)
            assert torch.equal(decoded(model, tokens, [9, 1, 2]), cached)
    with patchattn.patched(model, "xattention", threshold=0.0, stride=1, block=4):
        assert not torch.equal(outputs(model, input_ids=tokens)[0][:, -1], expected[:, -1])


def test_whole_blocks_of_queries_are_lists_for_the_kernels(calls: Recorded) -> None:
    model = patchattn.patch_model(FAMILIES["llama"].make_exact(), "xattention", threshold=0.5, stride=2, block=4)
    decoded(model, text(22), [13, 8, 1])
    kinds = [type(variants_in(model)[0].select(call)) for call, _, _ in calls[::2]]
    assert kinds == [BlockLists, torch.Tensor, type(None)]  # the second call begins inside of a block


def test_settings_and_models_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="block must be a multiple of stride=16, got 100"):
        patchattn.patch_model(tiny_llama(), "xattention", block=100)
    with pytest.raises(NotImplementedError, match="leaves out layers with a sliding window"):
        patchattn.patch_model(FAMILIES["mistral"].make(), "xattention")
    forgetful = FAMILIES["llama"].make()
    settings = {"streaming_llm": {"sinks": 1, "recent": 3, "slack": 0}, "xattention": {"block": 1, "stride": 1}}
    patchattn.patch_model(forgetful, ["streaming_llm", "xattention"], settings)
    with pytest.raises(NotImplementedError, match="lets go of some"):
        decoded(forgetful, text(14), [9, 1, 1, 1, 2])


def test_what_a_static_cache_holds_behind_the_text_is_in_no_tile(calls: Recorded) -> None:
    model = patchattn.patch_model(FAMILIES["llama"].make_exact(), "xattention", threshold=0.5, stride=2, block=2)
    tokens, cache = text(16), StaticCache(config=model.config, max_cache_len=16)
    outputs(model, input_ids=tokens[:, 5:], **cache_argument(model, cache))
    cache.reset()
    calls.clear()
    for layer in cache.layers:
        layer.keys.fill_(100.0)
    outputs(model, input_ids=tokens[:, :7], **cache_argument(model, cache))
    held = [seen[..., :7] for _, seen, _ in calls]
    calls.clear()
    outputs(model, input_ids=tokens[:, :7])
    for (_, seen, _), other in zip(calls, held, strict=True):
        assert torch.equal(seen, other)
