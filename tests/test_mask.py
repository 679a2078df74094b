"""The mask of a call against a table of every query and key, filled by loops."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchattn.core.given import read_mask
from patchattn.core.mask import Mask
from patchattn.core.ranks import Told
from patchattn_kernels import AttentionRule, block_sparse_attention, lists_from_mask, sink_and_recent

from .mask_tables import CPU, GROUPS, HEADS, Case, Table, case, cases, places, steps, whole


def check(mask: Mask, table: Table) -> None:
    seen = table.seen()
    batch, heads, rows, keys = seen.shape
    assert (mask.queries, mask.keys, mask.columns) == (rows, keys, table.real.shape[1])
    np.testing.assert_array_equal(whole(mask.seen(), *seen.shape), seen)
    counts = mask.counts()
    counts = counts[..., None] if counts.dim() == 2 else counts
    np.testing.assert_array_equal(whole(counts, batch, rows, heads), seen.sum(-1).transpose(0, 2, 1))
    real = np.zeros((batch, GROUPS, keys), dtype=bool)
    order = np.zeros((batch, GROUPS, keys), dtype=int)
    for b, g, j in np.ndindex(*real.shape):
        column = table.keys[b, g, j]
        real[b, g, j] = column == -2 or (column >= 0 and table.real[b, column])
        order[b, g, j] = table.rank(b, column)
    np.testing.assert_array_equal(whole(mask.real_keys(), *real.shape), real)
    np.testing.assert_array_equal(whole(mask.key_order(), *order.shape), order)
    own = [[table.rank(b, column) for column in table.own] for b in range(batch)]
    np.testing.assert_array_equal(whole(mask.row_order(), batch, rows), own)
    check_rule(mask.rule(0.5), seen, mask)


def check_rule(rule: AttentionRule, seen: np.ndarray, mask: Mask) -> None:
    """The kernels' rule shows the same, and adds to logits what the mask did."""
    rows, keys = seen.shape[2:]
    shown = rule.visible(slice(0, rows), (rows, keys), CPU)
    shown = shown if shown.dim() == 4 else shown[:, None]
    np.testing.assert_array_equal(whole(shown, *seen.shape), seen)
    added = mask.added()
    if added is not None:
        [term] = rule.added(slice(0, rows), keys)
        held = torch.tensor(seen)
        assert torch.equal(term.expand(held.shape)[held], added.expand(held.shape)[held])


@given(cases())
@settings(max_examples=300)
def test_every_format_says_what_loops_say(one: Case) -> None:
    check(one.mask, one.table)


@given(cases(), st.integers(0, 2**31))
@settings(max_examples=400)
def test_narrowed_gathered_cut_and_extended(one: Case, seed: int) -> None:
    for mask, table in steps(np.random.default_rng(seed), one):
        check(mask, table)


@given(cases())
def test_narrowed_by_nothing_is_the_very_mask_that_came_in(one: Case) -> None:
    mask = one.mask.narrowed(None)
    assert mask is one.mask
    assert mask.rendered()[0] is one.mask.given
    assert mask.rendered()[1] == {}
    everything = mask.narrowed(torch.ones(one.mask.batch, 1, one.mask.keys, dtype=torch.bool))
    for got, want in ((everything.seen(), mask.seen()), (everything.counts(), mask.counts())):
        assert torch.equal(got, want.expand(got.shape))


@given(cases(("causal", "all", "bool", "bool by head", "added", "added by head")), st.integers(0, 2**31))
@settings(max_examples=150)
def test_rendered_for_bases_that_take_a_tensor(one: Case, seed: int) -> None:
    for mask, table in steps(np.random.default_rng(seed), one):
        got, keywords = mask.rendered()
        assert keywords == {}
        seen = torch.tensor(table.seen())
        if got is None:  # a single row that sees all there is
            assert seen.all()
            assert seen.shape[2] == 1
            continue
        got = got.expand(seen.shape)
        if got.dtype == torch.bool:
            assert torch.equal(got, seen)
        else:
            assert (got[~seen] <= -5000).all()
            want = mask.added()
            torch.testing.assert_close(got[seen], (torch.zeros(()) if want is None else want).expand(seen.shape)[seen])


def told(mask: Mask) -> tuple[Any, dict[str, Any]] | str:
    """What the base implementation is given, or the message of a refusal."""
    try:
        return mask.rendered()
    except NotImplementedError as error:
        return str(error)


def flash_by_loops(
    mask: Any, keywords: dict[str, Any], shape: tuple[int, ...], causal: bool, start: np.ndarray
) -> np.ndarray:
    """What flash attention shows: hidden tokens are taken out, then causal rows are aligned to the last keys."""
    batch, _, rows, keys = shape
    real = np.ones((batch, keys), dtype=bool) if mask is None else mask.bool().numpy()
    shown, window = np.zeros(shape, dtype=bool), keywords.get("sliding_window")
    for b in range(batch):
        left = np.flatnonzero(real[b])
        asking = [i for i in range(rows) if rows == 1 or real[b, keys - rows + i]]
        for n, i in enumerate(asking):
            own = len(left) - len(asking) + n
            for place, j in enumerate(left):
                near = window is None or abs(place - own) < window
                near &= mask is not None or rows == 1 or start[b, j] == start[b, own]  # as its keywords say
                shown[b, :, i, j] = near and (not causal or place <= own)
    return shown


@given(cases(("flash", "tokens", "packed")), st.integers(0, 2**31))
@settings(max_examples=150)
def test_rendered_for_flash_attention_or_refused(one: Case, seed: int) -> None:
    for mask, table in steps(np.random.default_rng(seed), one):
        seen = table.seen()
        found = told(mask)
        if isinstance(found, str):
            assert "Flash attention cannot be told" in found
            assert mask.queries > 1 or mask.seen().shape[1] > 1
            continue
        shown = flash_by_loops(*found, seen.shape, one.mask.causal, one.table.start)
        real = [[mask.queries == 1 or table.real[b, own] for own in table.own] for b in range(len(seen))]
        for b, i in np.argwhere(np.array(real)):
            np.testing.assert_array_equal(shown[b, :, i], seen[b, :, i])


def test_rendered_for_flex_attention_or_refused() -> None:
    expressed = 0
    for seed in range(60):
        form = "block" if seed % 2 else "all blocks"
        for mask, table in steps(np.random.default_rng(seed), case(form, seed)):
            found, seen = told(mask), table.seen()
            if isinstance(found, str):
                assert "Flex attention cannot be told" in found
                continue
            expressed += 1
            for place in np.ndindex(*seen.shape):
                assert bool(found[0].mask_mod(*(torch.tensor(n) for n in place))) == seen[place]
    assert expressed > 10


def test_flex_attention_reads_one_head_of_a_tensor() -> None:
    mask = read_mask(torch.zeros(1, HEADS, 2, 2), form="blocks", meaning="all", **sizes(2, 2))
    with pytest.raises(NotImplementedError, match="reads the first head"):
        mask.rendered()


def sizes(rows: int, keys: int) -> dict[str, Any]:
    return {"batch": 1, "heads": HEADS, "queries": rows, "keys": keys, "device": CPU}


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_ranks_in_a_static_cache_count_to_the_own_key(rows: int, told: bool) -> None:
    """Slots 7 to 11 are not filled, tokens 0 and 1 are padding, and the device alone knows how many are filled."""
    seen = torch.ones(12, 12).bool().tril()[7 - rows : 7].clone()
    seen[:, :2] = False
    own = torch.tensor(7 - rows) if told else None
    mask = read_mask(seen[None, None], form="bool", meaning="causal", own=own, **sizes(rows, 12))
    assert mask.row_order().tolist() == [[5 - rows + 1 + i for i in range(rows)]]
    assert mask.key_order().tolist() == [[[0, 0, 1, 2, 3, 4, 5, 5, 5, 5, 5, 5]]]


def test_ranks_count_what_a_window_hides_and_what_has_left_the_cache() -> None:
    """One row, window 3: keys 6, 7 and 8 of nine are seen, and they are not the first ones; all are text."""
    seen = torch.zeros(1, 1, 1, 9).bool()
    seen[..., 6:] = True
    mask = read_mask(seen, form="bool", meaning="causal", window=3, own=8, told=Told("all"), **sizes(1, 9))
    assert mask.key_order().tolist() == [[list(range(1, 10))]]
    how: dict[str, Any] = {"form": "bool", "meaning": "causal", "told": Told("all")}
    left = read_mask(seen[..., 6:], window=3, own=2, dropped=6, **how, **sizes(1, 3))
    assert left.key_order().tolist() == [[[7, 8, 9]]]
    assert left.row_order().tolist() == [[9]]
    for one in (mask, left):
        kept = one.narrowed(sink_and_recent(2, 1, HEADS))
        assert kept.counts().squeeze().tolist() == [1] * HEADS  # the own key; no sink is left


@given(cases(("all", "causal", "flash", "tokens", "bool", "added", "bool by head")), st.integers(0, 2**31))
@settings(max_examples=100)
def test_sinks_and_recent_keys_by_the_rule(one: Case, seed: int) -> None:
    """What the operation computes from the rule of a gathered mask, against weights pair by pair."""
    random = np.random.default_rng(seed)
    index, table = places(random, one.table)
    mask = one.mask.at(index, has_empty=True)
    for case_mask, case_table in ((one.mask, one.table), (mask, table)):
        sinks, recent = random.integers(0, 3, HEADS).tolist(), random.integers(1, 4, HEADS).tolist()
        batch, _, rows, keys = case_table.kept.shape
        query = torch.tensor(random.standard_normal((batch, HEADS, rows, 8)))
        key, value = (torch.tensor(random.standard_normal((batch, GROUPS, keys, 8))) for _ in range(2))
        rule = case_mask.rule(0.3)
        got = block_sparse_attention(query, key, value, sink_and_recent(sinks, recent, HEADS), rule)
        shown = case_table.seen() & case_table.stays(sinks, recent)
        added = case_mask.added()
        bias = np.zeros(shown.shape) if added is None else whole(added.double(), *shown.shape)
        for b, h, i in np.ndindex(*shown.shape[:3]):
            seen = np.flatnonzero(shown[b, h, i])
            group = h // (HEADS // GROUPS)
            powers = np.exp(0.3 * key[b, group, seen].numpy() @ query[b, h, i].numpy() + bias[b, h, i, seen])
            want = powers @ value[b, group, seen].numpy() / powers.sum() if len(seen) else np.zeros(8)
            np.testing.assert_allclose(got[b, h, i].numpy(), want, rtol=1e-6, atol=1e-6)


# --- heads, padding, refusals -----------------------------------------------------------------------------------------


@given(cases(), st.integers(0, 2**31))
def test_of_some_heads(one: Case, seed: int) -> None:
    heads = [3, 0]
    for mask, table in [(one.mask, one.table), *steps(np.random.default_rng(seed), one)]:
        got = mask.of_heads(heads)
        want = table.seen()[:, heads]
        np.testing.assert_array_equal(whole(got.seen(), *want.shape), want)


@pytest.mark.parametrize("kind", ["bool", "added", "tokens", "none"])
def test_padding_is_what_does_not_see_itself(kind: str) -> None:
    real = torch.tensor([[False, False, True, True, True], [True, True, True, True, False]])
    seen = (real[:, None, None] & torch.ones(5, 5).bool().tril()).clone()
    passed: Any = {"bool": seen, "added": torch.zeros(seen.shape).masked_fill(~seen, -1e9), "tokens": real}.get(kind)
    how = {"form": "tokens", "meaning": "flash"}
    mask = read_mask(passed, **how, **{**sizes(5, 5), "batch": 2})
    want = torch.ones(1, 5).bool() if kind == "none" else real
    assert mask.real().tolist() == want.tolist()
    last = read_mask(
        None if passed is None else passed[..., -2:, :] if passed.dim() == 4 else passed,
        **how,
        own=3,
        **{**sizes(2, 5), "batch": 2},
    )
    assert last.real().tolist() == want[:, 3:].tolist()
    cross = read_mask(passed, **how, is_cross=True, **{**sizes(5, 5), "batch": 2})
    assert cross.real()[1].all() if kind in ("bool", "added") else cross.real().all()


def test_what_is_not_known_is_refused_when_it_is_asked_for() -> None:
    odd = read_mask(torch.ones(1, 2, 3), form="bool", meaning="all", **sizes(2, 3))
    silent = read_mask(None, form=None, meaning="Nothing is known of 'mine'.", **sizes(2, 3))
    cross = read_mask(None, form="bool", meaning="all", is_cross=True, **sizes(2, 3))
    asks: list[tuple[Callable[[], Any], str]] = [
        (odd.seen, r"Masks of type Tensor and shape torch.Size\(\[1, 2, 3\]\)"),
        (odd.counts, "Masks of type"),
        (silent.rule, "Nothing is known of 'mine'"),
        (cross.row_order, "not known which keys"),
        (lambda: cross.prepended(1).at(torch.zeros(1, 1, 1).long(), has_empty=False), "gather first"),
        (lambda: silent.prepended(1).rendered(), "cannot be told a changed mask"),
    ]
    for ask, message in asks:
        with pytest.raises(NotImplementedError, match=message):
            ask()
    assert odd.rendered()[0] is odd.given
    assert silent.real().all()


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        (torch.ones(1, 1, 3), TypeError, "got torch.float32"),
        ([True], TypeError, "got list"),
        (torch.ones(1, 1, 4).bool(), ValueError, r"got \(1, 1, 4\)"),
        (torch.ones(1, 3, 3).bool(), ValueError, r"got \(1, 3, 3\)"),
        (torch.ones(1, 2, 2, 3).bool(), ValueError, r"got \(1, 2, 2, 3\)"),
        (sink_and_recent(1, 2, 3), ValueError, "of 4 heads, got 3"),
        (lists_from_mask(torch.ones(1, 3, 1, 1).bool(), 2, 3), ValueError, "4 heads"),
    ],
)
def test_narrowing_by_what_does_not_fit(keep: Any, error: type[Exception], message: str) -> None:
    mask = read_mask(None, form="bool", meaning="all", **sizes(2, 3))
    with pytest.raises(error, match=message):
        mask.narrowed(keep)


def test_an_index_that_does_not_fit() -> None:
    mask = read_mask(None, form="bool", meaning="all", **sizes(2, 3))
    with pytest.raises(ValueError, match=r"got \(1, 3, 2\)"):
        mask.at(torch.zeros(1, 3, 2).long(), has_empty=False)
