"""Texts packed in one row, told by a mask of pairs or by position ids: each is computed as if it were alone."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

import patchattn
from patchattn.core.given import read_mask
from patchattn_kernels import AttentionRule, block_sparse_attention, sink_and_recent
from patchattn_kernels.block_lists import seen_blocks

from .families import FAMILIES, VOCABULARY
from .test_own_keys import looking

LENGTHS = ((5, 7, 4), (3, 1, 12))
LENGTH = sum(LENGTHS[0])
TOKENS = torch.randint(5, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(5))
TEXT = torch.stack([torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)) for lengths in LENGTHS])
NUMBERS = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in LENGTHS])
VARIANTS = {
    "streaming": {"sinks": 2, "recent": 2},
    "streaming_llm": {"sinks": 2, "recent": 1, "slack": 2},
    "power": {"block": 1, "local": 1},
    "heads": {"gain": 0.0, "heads": [[0, 1], [1, 2]], "rows": "marked", "tokens": (1, 3)},
}


def pairs_of(form: str, window: int = LENGTH) -> Any:
    """`(2, 1, T, T)`: block-diagonal and causal."""
    row = torch.arange(LENGTH)
    seen = (TEXT[:, :, None] == TEXT[:, None]) & (row <= row[:, None]) & (row > row[:, None] - window)
    if form == "bool":
        return seen[:, None]
    if form == "added":
        return torch.zeros(2, 1, LENGTH, LENGTH).double().masked_fill(~seen[:, None], torch.finfo(torch.float64).min)
    return create_block_mask(lambda b, h, i, j: seen[b, i, j], 2, None, LENGTH, LENGTH, device="cpu")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize(("family", "form"), [("llama", "bool"), ("llama", "added"), ("mistral", "bool")])
def test_texts_behind_a_mask_of_pairs_are_the_texts_alone(
    family: str, form: str, positions: bool, variant: str
) -> None:
    """Position ids do not say where texts begin, if they go on through the row: rotations tell distances alone."""
    model = FAMILIES[family].make_exact()
    if form == "added":
        model.set_attn_implementation("eager")
    words = {"position_ids": NUMBERS} if positions else {}
    with torch.no_grad(), patchattn.patched(model, variant, **VARIANTS[variant]):
        window = 4 if family == "mistral" else LENGTH
        together = model(TOKENS, attention_mask=pairs_of(form, window), use_cache=False, **words).logits
        for b in range(2):
            for got, tokens in zip(together[b].split(LENGTHS[b]), TOKENS[b].split(LENGTHS[b]), strict=True):
                alone = model(tokens[None], use_cache=False).logits[0]
                torch.testing.assert_close(got, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_texts_told_by_their_position_ids_are_the_texts_alone(family: str, variant: str) -> None:
    model = FAMILIES[family].make_exact()
    with torch.no_grad(), patchattn.patched(model, variant, **VARIANTS[variant]):
        together = model(TOKENS, position_ids=NUMBERS, use_cache=False).logits
        for b in range(2):
            for got, tokens in zip(together[b].split(LENGTHS[b]), TOKENS[b].split(LENGTHS[b]), strict=True):
                alone = model(tokens[None], use_cache=False).logits[0]
                torch.testing.assert_close(got, alone, rtol=1e-5, atol=1e-5)


def kept_by_loops(sinks: list[int], recent: list[int]) -> np.ndarray:
    """`(2, H, T, T)`: first and last keys of each token's own text."""
    kept = np.zeros((2, len(sinks), LENGTH, LENGTH), dtype=bool)
    for b, h, i, j in np.ndindex(*kept.shape):
        together = TEXT[b, i] == TEXT[b, j] and j <= i
        kept[b, h, i, j] = together and (NUMBERS[b, j] < sinks[h] or i - j < recent[h])
    return kept


@pytest.mark.parametrize("form", ["bool", "added", "blocks"])
def test_sinks_of_a_mask_and_of_its_rule(form: str) -> None:
    """As a mask, as a rule of the kernels, of some of its rows, and of some of its keys."""
    sinks, recent = [1, 0, 2, 3], [1, 2, 2, 1]
    keep, wanted = sink_and_recent(sinks, recent, 4), kept_by_loops(sinks, recent)
    sizes: dict[str, Any] = {"batch": 2, "heads": 4, "queries": LENGTH, "keys": LENGTH, "device": torch.device("cpu")}
    mask = read_mask(pairs_of(form), form=form, meaning="causal", **sizes)
    narrow = mask.narrowed(keep)
    assert narrow.seen().numpy().tolist() == wanted.tolist()
    assert mask.row_places().tolist() == (NUMBERS + 1).tolist()
    assert mask.key_places()[:, 0].tolist() == (NUMBERS + 1).tolist()
    rows = torch.tensor([2, 6, 9, 15])
    for part in (narrow.of_rows(rows), mask.of_rows(rows).narrowed(keep)):
        assert part.seen().numpy().tolist() == wanted[:, :, rows].tolist()
    index = torch.tensor([-1, 0, 3, 5, 6, 8, 12, 13])
    some = mask.at(index[None, None], has_empty=True).narrowed(keep).seen().numpy()
    assert some[..., 1:].tolist() == wanted[..., index[1:]].tolist()

    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(2, 4, LENGTH, 8, generator=generator).double() for _ in range(3))
    logits = (query @ key.mT).masked_fill(~torch.tensor(wanted), float("-inf"))
    by_rule = block_sparse_attention(query, key, value, keep, mask.rule())
    torch.testing.assert_close(by_rule, logits.softmax(-1) @ value)
    of_rows = block_sparse_attention(query[:, :, rows], key, value, keep, mask.of_rows(rows).rule())
    torch.testing.assert_close(of_rows, (logits.softmax(-1) @ value)[:, :, rows])


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_blocks_that_hold_sinks_of_any_text_are_seen(texts: list[int], block_q: int, block_k: int, dense: bool) -> None:
    size = sum(texts)
    text = torch.repeat_interleave(torch.arange(len(texts)), torch.tensor(texts))
    number = torch.cat([torch.arange(n) for n in texts])
    row = torch.arange(size)
    together = (text[:, None] == text) & (row <= row[:, None])
    rule = AttentionRule(1.0, causal=True, sequence=text)
    if dense:
        rule = AttentionRule(1.0, mask=together[None, None], place=number[None, None] + 1)
    keep = sink_and_recent([2, 0], [1, 2], 2)
    sizes = {"queries": size, "keys": size, "block_q": block_q, "block_k": block_k}
    found = seen_blocks(rule, **sizes, device=torch.device("cpu"), window=keep)
    for h, i, j in np.ndindex(2, size, size):
        if together[i, j] and (number[j] < keep.sinks[h] or i - j < keep.recent[h]):
            assert found[0, h, i // block_q, j // block_k]


def test_what_only_looks_like_a_text_of_its_own() -> None:
    """Rows that skip their neighbours, padding, a window of one, tokens that see only later ones, single rows."""
    row = torch.arange(8)
    causal = row <= row[:, None]
    strided = causal & ((row[:, None] - row) % 2 == 0)
    padded = causal & (row >= 3)
    backwards = row >= row[:, None]
    one = row == row[:, None]
    for seen, window in ((strided, None), (padded, None), (backwards, None), (one, 1), (causal, None)):
        sizes: dict[str, Any] = {"batch": 1, "heads": 2, "queries": 8, "keys": 8, "device": torch.device("cpu")}
        mask = read_mask(seen[None, None], form="bool", meaning="causal", window=window, **sizes)
        assert mask.row_places().tolist() == mask.row_order().tolist()


def test_one_call_in_a_model_tells_its_texts_apart() -> None:
    model = FAMILIES["llama"].make()
    with torch.no_grad(), looking(False) as (name, calls), patchattn.patched(model, name):
        model(TOKENS, attention_mask=pairs_of("bool"), use_cache=False)
    call = calls[0].row(9)
    assert call.mask.row_places().tolist() == (NUMBERS[:, 9:10] + 1).tolist()
