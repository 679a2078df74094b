"""Masks in every format beside tables of every query and key that loops fill, and changes of both."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from patchattn.core.given import read_mask
from patchattn.core.mask import Mask
from patchattn_kernels import lists_from_mask, sink_and_recent

BATCH, HEADS, GROUPS = 2, 4, 2
CPU = torch.device("cpu")
FORMATS = ("causal", "all", "flash", "packed", "tokens", "bool", "bool by head", "added", "added by head", "block")


@dataclass
class Table:
    """What is seen, pair by pair.

    Attributes:
        sees: `(B, H, Tq, C)` by column.
        real: `(B, C)`.
        own: column of each query's own key.
        keys: `(B, G, Tk)` column of each key, -1: empty, -2: of no column and always seen.
        kept: `(B, H, Tq, Tk)`.
        start: `(B, C)` first column of each one's sequence.
    """

    sees: np.ndarray
    real: np.ndarray
    own: list[int]
    keys: np.ndarray
    kept: np.ndarray
    start: np.ndarray

    def seen(self) -> np.ndarray:
        found = self.kept.copy()
        for b, h, i, j in np.ndindex(*found.shape):
            column = self.keys[b, h // (HEADS // GROUPS), j]
            found[b, h, i, j] &= column == -2 or (column >= 0 and self.sees[b, h, i, column])
        return found

    def rank(self, b: int, column: int) -> int:
        return sum(int(self.real[b, c]) for c in range(column + 1)) if column >= 0 else 0

    def stays(self, sinks: list[int], recent: list[int]) -> np.ndarray:
        found = np.zeros(self.kept.shape, dtype=bool)
        for b, h, i, j in np.ndindex(*found.shape):
            column = self.keys[b, h // (HEADS // GROUPS), j]
            key, own = self.rank(b, column), self.rank(b, self.own[i])
            place = key - (self.rank(b, self.start[b, column] - 1) if column >= 0 else 0)
            found[b, h, i, j] = place <= sinks[h] or abs(own - key) < recent[h]
        return found


@dataclass
class Case:
    mask: Mask
    table: Table
    format: str


def window_or_none(random: np.random.Generator) -> int | None:
    return None if random.random() < 0.5 else int(random.integers(1, 5))


@st.composite
def cases(draw: Any, formats: tuple[str, ...] = FORMATS) -> Case:
    return case(draw(st.sampled_from(formats)), draw(st.integers(0, 2**31)))


def case(form: str, seed: int) -> Case:
    random = np.random.default_rng(seed)
    rows, more = (int(n) for n in random.integers(1, 5, 2))
    rows = 1 if random.random() < 0.3 else rows
    keys, causal, window, sequence = rows + more - 1, random.random() < 0.6, None, None
    first = keys - rows
    batch, heads = (1 if form == "packed" else BATCH), (HEADS if "head" in form or form == "block" else 1)
    real = np.ones((batch, keys), dtype=bool)
    table = np.ones((batch, HEADS, rows, keys), dtype=bool)
    start = np.zeros((batch, keys), dtype=int)
    passed: Any = None
    how: dict[str, Any] = {"meaning": "flash", "form": "tokens"}
    if form == "causal":
        how, first, causal = {"meaning": "causal", "form": "bool"}, 0, True
    elif form in ("all", "all blocks"):
        how, causal = {"meaning": "all", "form": "added" if form == "all" else "blocks"}, False
    elif form in ("flash", "tokens", "packed"):
        window = window_or_none(random)
        if form == "tokens":
            real = random.random((batch, keys)) < 0.7
            passed = torch.tensor(real).long()
        if form == "packed":
            rows, first, table = keys, 0, np.ones((batch, HEADS, keys, keys), dtype=bool)
            numbers = np.sort(random.integers(0, 3, keys))
            start = np.array([[int(np.flatnonzero(numbers == number)[0]) for number in numbers]])
            sequence = torch.tensor(numbers)
    for b, h, i, j in np.ndindex(*table.shape):
        own = i + first
        between = sum(real[b, min(j, own) + 1 : max(j, own) + 1])
        near = window is None or between < window
        together = start[0, j] == start[0, own] if form == "packed" else True
        table[b, h, i, j] = real[b, j] and (not causal or j <= own) and near and together
    if form.split()[0] in ("bool", "added", "block"):
        shown = random.random((batch, heads, rows, keys)) < 0.6
        table = np.broadcast_to(shown, (batch, HEADS, rows, keys)).copy()
        real = table.any(axis=(1, 2))
        if form != "block":
            start = starts(table, real, first)
        passed, how = torch.tensor(shown), {"meaning": "all", "form": form.split()[0], "own": first}
        if "added" in form:
            bias = torch.tensor(random.standard_normal(shown.shape), dtype=torch.float32)
            passed = bias.masked_fill(~passed, float(random.choice([-1e4, torch.finfo(torch.float32).min, -np.inf])))
        elif form == "block":
            known = passed
            passed = create_block_mask(lambda b, h, i, j: known[b, h, i, j], batch, heads, rows, keys, device="cpu")
            how["form"] = "blocks"
    mask = read_mask(
        passed,
        **how,
        batch=batch,
        heads=HEADS,
        queries=rows,
        keys=keys,
        device=CPU,
        is_causal=causal,
        window=window,
        sequence=sequence,
    )
    columns = np.broadcast_to(np.arange(keys), (batch, GROUPS, keys)).copy()
    own = list(range(first, first + rows))
    return Case(mask, Table(table, real, own, columns, np.ones((batch, HEADS, rows, keys), dtype=bool), start), form)


def starts(sees: np.ndarray, real: np.ndarray, first: int) -> np.ndarray:
    """`(B, C)`: a sequence starts at a real key of a query that no query from there on looks behind, and none before it
    looks at or beyond. Queries whose own key is not real say nothing."""
    batch, _, rows, keys = sees.shape
    found = np.zeros((batch, keys), dtype=int)
    for b in range(batch):
        looks = {i: np.flatnonzero(sees[b, :, i].any(0) & real[b]) for i in range(rows) if real[b, first + i]}
        for begin in range(max(1, first), first + rows if rows > 1 else 0):
            if real[b, begin] and all(
                (columns >= begin).all() if first + i >= begin else (columns < begin).all()
                for i, columns in looks.items()
            ):
                found[b, begin:] = begin
    return found


def whole(tensor: torch.Tensor, *shape: int) -> np.ndarray:
    return tensor.expand(*shape).numpy()


def places(random: np.random.Generator, table: Table) -> tuple[torch.Tensor, Table]:
    """Some keys of each sequence and kv head, of the same in both kv heads or not, behind empty slots."""
    batch, _, keys = table.keys.shape
    groups, count = int(random.choice([1, GROUPS])), int(random.integers(1, keys + 2))
    chosen = np.full((int(random.choice([1, batch])), groups, count), -1)
    for b, g in np.ndindex(*chosen.shape[:2]):
        some = np.flatnonzero(random.random(keys) < 0.6)[-count:]
        if len(some):
            chosen[b, g, -len(some) :] = some
    index = np.broadcast_to(chosen, (batch, GROUPS, count))
    columns = np.where(index < 0, -1, np.take_along_axis(table.keys, index.clip(0), axis=-1))
    by_head = np.repeat(index, HEADS // GROUPS, axis=1)[:, :, None].clip(0)
    by_head = np.broadcast_to(by_head, (*table.kept.shape[:3], count))
    kept = np.take_along_axis(table.kept, by_head, axis=-1)
    return torch.tensor(chosen), replace(table, keys=columns, kept=kept)


def narrowed(random: np.random.Generator, mask: Mask, table: Table) -> tuple[Mask, Table]:
    batch, heads, rows, keys = table.kept.shape
    kind = random.choice(["keys", "pairs", "window", "blocks", "recent", "alike"])
    if kind == "alike":  # one entry stands for all heads
        first, last = int(random.integers(0, 3)), int(random.integers(1, 4))
        stays = table.stays([first] * heads, [last] * heads)
        return mask.narrowed(sink_and_recent(first, last, 1)), replace(table, kept=table.kept & stays)
    if kind in ("window", "recent"):
        sinks = [0] * heads if kind == "recent" else random.integers(0, 3, heads).tolist()
        recent = heads * [int(random.integers(1, 4))] if kind == "recent" else random.integers(1, 4, heads).tolist()
        return mask.narrowed(sink_and_recent(sinks, recent, heads)), replace(
            table, kept=table.kept & table.stays(sinks, recent)
        )
    if kind == "blocks":
        block_q, block_k = (int(size) for size in random.integers(1, 4, 2))
        blocks = random.random((batch, random.choice([1, heads]), -(-rows // block_q), -(-keys // block_k))) < 0.6
        stays = blocks.repeat(block_q, axis=2)[:, :, :rows].repeat(block_k, axis=3)[..., :keys]
        lists = lists_from_mask(torch.tensor(blocks), block_q, block_k)
        return mask.narrowed(lists), replace(table, kept=table.kept & stays)
    shape = (batch, int(random.choice([1, GROUPS, heads])), keys)
    if kind == "pairs":
        shape = (batch, int(random.choice([1, heads])), int(random.choice([1, rows])), keys)
    keep = random.random(shape) < 0.7
    stays = keep if keep.ndim == 4 else keep[:, :, None]
    stays = stays.repeat(heads // stays.shape[1], axis=1)
    return mask.narrowed(torch.tensor(keep)), replace(table, kept=table.kept & stays)


def rows_of(random: np.random.Generator, mask: Mask, table: Table) -> tuple[Mask, Table]:
    rows = np.sort(random.choice(len(table.own), int(random.integers(1, len(table.own) + 1)), replace=False))
    return mask.of_rows(torch.tensor(rows)), replace(
        table, sees=table.sees[:, :, rows], own=[table.own[i] for i in rows], kept=table.kept[:, :, rows]
    )


def prepended(mask: Mask, table: Table, count: int) -> tuple[Mask, Table]:
    wide = [(0, 0)] * 2
    kept = np.pad(table.kept, [*wide, (0, 0), (count, 0)], constant_values=True)
    keys = np.pad(table.keys, [*wide, (count, 0)], constant_values=-2)
    return mask.prepended(count), replace(table, kept=kept, keys=keys)


def steps(random: np.random.Generator, one: Case) -> Iterator[tuple[Mask, Table]]:
    """The mask after each of some changes, in any order, of which prepending is the last."""
    mask, table = one.mask, one.table
    for _ in range(int(random.integers(1, 4))):
        kind = random.choice(["narrowed", "at", "rows"])
        if kind == "narrowed":
            mask, table = narrowed(random, mask, table)
        elif kind == "rows":
            mask, table = rows_of(random, mask, table)
        else:
            index, table = places(random, table)
            mask = mask.at(index, has_empty=bool((index < 0).any()))
        yield mask, table
    mask, table = prepended(mask, table, int(random.integers(1, 3)))
    yield mask, table
    yield narrowed(random, mask, table)
