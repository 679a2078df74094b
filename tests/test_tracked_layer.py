"""The cache layer that appends in place and may forget keys, against lists of what it was given."""

import copy
import pickle
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from transformers.cache_utils import DynamicLayer

from patchattn.cache.compact import Ragged
from patchattn.cache.tracked import sequence_state, track

HEADS, WIDTH = 2, 3
OWNER = "toy in layer 0"
SLACK = 4


def some(batch: int, rows: int, heads: int = HEADS, width: int = WIDTH) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, heads, rows, width), torch.randn(batch, heads, rows, width + 1)


def tracked_layer() -> Any:
    return track(DynamicLayer())


@dataclass
class Reference:
    """A cache layer as lists: all tokens ever given, and every decision to drop some, by row and head."""

    tokens: list[list[list[list[float]]]] = field(default_factory=list)  # row, head, column
    decisions: list[tuple[int, list[list[set[int]]]]] = field(
        default_factory=list
    )  # from how many tokens on, columns dropped
    lasting: int = 0  # tokens that need not come back: those before the last SLACK, whenever some were dropped

    def seen(self) -> int:
        return len(self.tokens[0][0]) if self.tokens else 0

    def visible(self, row: int, head: int) -> list[int]:
        gone = set().union(*(dropped[row][head] for _, dropped in self.decisions))
        return [column for column in range(self.seen()) if column not in gone]

    def pick(self, rows: list[int]) -> None:
        self.tokens = [copy.deepcopy(self.tokens[row]) for row in rows]
        self.decisions = [(seen, [dropped[row] for row in rows]) for seen, dropped in self.decisions]

    def crop(self, left: int) -> None:
        self.tokens = [[head[:left] for head in row] for row in self.tokens]
        self.decisions = [(seen, dropped) for seen, dropped in self.decisions if seen <= left]


class Layers(RuleBasedStateMachine):
    """Layers that were forked from one, each compared with its own lists after every step."""

    forms: set[type] = set()  # in which the first keys were held

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Any, Reference]] = []
        self.handed: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.mode = torch.no_grad()
        self.mode.__enter__()

    def teardown(self) -> None:
        self.mode.__exit__(None, None, None)

    def of(self, number: int) -> tuple[Any, Reference]:
        return self.pairs[number % len(self.pairs)]

    @initialize(batch=st.integers(1, 3), rows=st.integers(1, 9), seed=st.integers(0, 99))
    def start(self, batch: int, rows: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.pairs = [(tracked_layer(), Reference())]
        self.give(0, rows, batch)

    def give(self, number: int, rows: int, batch: int) -> None:
        layer, reference = self.of(number)
        keys, values = some(batch, rows)
        if not reference.tokens:
            reference.tokens = [[[] for _ in range(HEADS)] for _ in range(batch)]
        for row in range(batch):
            for head in range(HEADS):
                new = torch.cat([keys, values], dim=-1)[row, head].tolist()
                reference.tokens[row][head] += new
        layer.is_expected = True
        held = layer.update(keys, values)
        self.handed += [(tensor, tensor.clone()) for tensor in held]
        state = sequence_state(layer, OWNER, rows=rows, rewinds=True)
        assert state is not None
        state.align(layer, held[0].shape[2], rows)
        stamp = held[0][..., 0].repeat_interleave(2, dim=1)  # of every query head
        if "stamp" in state.per_key:
            old, now = state.per_key["stamp"][..., :-rows], stamp[..., :-rows]
            if layer.kept is not None:  # an empty slot may hold anything
                filled = layer.kept.columns[..., :-rows].expand(-1, HEADS, -1).repeat_interleave(2, dim=1) >= 0
                old, now = old[filled], now[filled]
            assert torch.equal(old, now)
        state.write("stamp", stamp, per_key=True)
        highest = state.blocks("highest", 3, held[0], lambda pages, _: pages.unflatten(2, (-1, 3)).amax(dim=3))
        pages = [held[0][:, :, i : i + 3].amax(dim=2) for i in range(0, held[0].shape[2] - 2, 3)]
        assert (highest is None) == (not pages)
        if highest is not None:
            assert torch.equal(highest, torch.stack(pages, dim=2))

    @rule(number=st.integers(0, 9), rows=st.integers(1, 5))
    def update(self, number: int, rows: int) -> None:
        _, reference = self.of(number)
        self.give(number, rows, len(reference.tokens))

    @rule(number=st.integers(0, 9), removed=st.integers(0, 9))
    def crop(self, number: int, removed: int) -> None:
        layer, reference = self.of(number)
        removed = min(removed, reference.seen() - 1)
        left = reference.seen() - removed
        try:
            layer.crop(-removed)
        except NotImplementedError as error:
            assert "has forgotten keys" in str(error)  # noqa: PT017
            assert left < reference.lasting
            assert any(seen > left for seen, _ in reference.decisions)
        else:
            reference.crop(left)

    @rule(
        number=st.integers(0, 9),
        alike=st.booleans(),
        is_bound_known=st.booleans(),
        share=st.floats(0.1, 1.0),
        since=st.integers(0, 6),
    )
    def keep(self, number: int, alike: bool, is_bound_known: bool, share: float, since: int) -> None:
        layer, _ = self.of(number)
        kept = torch.rand(len(layer.keys), 1 if alike else HEADS, layer.stored) < share
        self.drop(number, kept, since, int(kept.sum(-1).max()) if is_bound_known else None)

    @rule(number=st.integers(0, 9), share=st.floats(0.0, 1.0), rows=st.integers(1, 3), is_bound_known=st.booleans())
    def keep_fewer_in_one_head(self, number: int, share: float, rows: int, is_bound_known: bool) -> None:
        """And have it leave storage."""
        layer, reference = self.of(number)
        if layer.stored < 2:
            return
        kept = torch.rand(len(layer.keys), HEADS, layer.stored) < torch.tensor([share, share / 4])[:, None]
        self.drop(number, kept, 0, tuple(kept.sum(-1).amax(0).tolist()) if is_bound_known else None)
        self.give(number, SLACK + rows, len(reference.tokens))
        every = torch.ones(len(layer.keys), HEADS, layer.stored, dtype=torch.bool)
        self.drop(number, every, 0, (layer.stored,) * HEADS if is_bound_known else None)

    def drop(self, number: int, kept: torch.Tensor, since: int, bound: int | tuple[int, ...] | None) -> None:
        layer, reference = self.of(number)
        batch = len(reference.tokens)
        columns = torch.arange(layer.stored).expand(batch, 1, -1) if layer.kept is None else layer.kept.columns
        columns = columns.expand(-1, HEADS, -1)  # also of what is hidden, and may be dropped once more
        wide = kept.expand(-1, HEADS, -1)
        dropped = [
            [set(columns[row, head][~wide[row, head]].tolist()) - {-1} for head in range(HEADS)] for row in range(batch)
        ]
        before = max(0, reference.seen() - since)
        dropped = [[{column for column in head if column < before} for head in row] for row in dropped]
        reference.decisions.append((before, dropped))
        reference.lasting = max(reference.lasting, reference.seen() - SLACK)
        layer.keep(kept, owner=OWNER, bound=bound, slack=SLACK, since=since)
        self.forms.add(type(layer.first))

    @rule(number=st.integers(0, 9), rows=st.lists(st.integers(0, 9), min_size=1, max_size=3), reorder=st.booleans())
    def select(self, number: int, rows: list[int], reorder: bool) -> None:
        layer, reference = self.of(number)
        batch = len(reference.tokens)
        chosen = [row % batch for row in (rows * 3)[: batch if reorder else len(rows)]]
        (layer.reorder_cache if reorder else layer.batch_select_indices)(torch.tensor(chosen))
        reference.pick(chosen)

    @rule(number=st.integers(0, 9))
    def repeat(self, number: int) -> None:
        layer, reference = self.of(number)
        if len(reference.tokens) < 3:
            layer.batch_repeat_interleave(2)
            reference.pick([row for row in range(len(reference.tokens)) for _ in range(2)])

    @rule(number=st.integers(0, 9))
    def offload(self, number: int) -> None:
        layer, _ = self.of(number)
        layer.offload()
        layer.prefetch()

    @rule(number=st.integers(0, 9), how=st.sampled_from(["copy", "deepcopy", "pickle"]))
    def fork(self, number: int, how: str) -> None:
        layer, reference = self.of(number)
        makes: dict[str, Any] = {
            "copy": copy.copy,
            "deepcopy": copy.deepcopy,
            "pickle": lambda one: pickle.loads(pickle.dumps(one)),
        }
        if len(self.pairs) < 4:
            self.pairs.append((makes[how](layer), copy.deepcopy(reference)))

    @rule(number=st.integers(0, 9), rows=st.integers(1, 5), batch=st.integers(1, 3))
    def reset(self, number: int, rows: int, batch: int) -> None:
        layer, reference = self.of(number)
        layer.reset()
        assert layer.get_seq_length() == 0
        assert layer.get_mask_sizes(3) == (3, 0)
        reference.tokens, reference.decisions, reference.lasting = [], [], 0
        self.give(number, rows, batch)

    @invariant()
    def layers_are_as_their_lists(self) -> None:
        for layer, reference in self.pairs:
            assert layer.get_seq_length() == reference.seen()
            assert layer.get_mask_sizes(2) == (reference.seen() + 2, 0)
            keys, columns = torch.cat(layer.whole(), dim=-1), layer.columns()
            if columns is None:
                columns = torch.arange(keys.shape[2]).expand(len(keys), HEADS, -1)
            columns = columns.expand(-1, HEADS, -1)
            for row, heads in enumerate(reference.tokens):
                for head, tokens in enumerate(heads):
                    found = [int(column) for column in columns[row, head] if column >= 0]
                    assert found == reference.visible(row, head)
                    stored = keys[row, head][columns[row, head] >= 0].tolist()
                    assert stored == [tokens[column] for column in found]

    @invariant()
    def what_was_handed_out_stays(self) -> None:
        assert all(torch.equal(tensor, as_it_was) for tensor, as_it_was in self.handed)


TestLayers = Layers.TestCase
TestLayers.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


def test_both_forms_were_tried() -> None:
    """After the layers above, whose examples are drawn."""
    if Layers.forms:
        assert Layers.forms == {type(None), Ragged}
