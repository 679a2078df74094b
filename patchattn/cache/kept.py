"""Which keys a cache layer that forgets still stores, of which columns they are, and which of them are seen."""

import copy
from collections.abc import Callable
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F

from . import waiting
from .compact import not_as_attended

_NEVER = torch.iinfo(torch.int32).max


def is_worth_moving(held: float, left: float) -> bool:
    """Whether so many keys are to leave storage: moving those left costs as much as appending by copying does."""
    return held - left >= max(1, min(held // 16, 256))


class Decision(NamedTuple):
    """One drop of keys.

    Attributes:
        holds_from: how many tokens were seen when it was right already.
        seen: how many when it was made.
        bounds: the largest number of keys of a row that were left then in all heads, or in each, if that is known.
    """

    holds_from: int
    seen: int
    bounds: tuple[int, ...] | None

    def check(self, most: list[int], since: int) -> None:
        """ValueError if a row has more keys in some head, of which so many came since."""
        bounds = () if self.bounds is None else self.bounds * (len(most) if len(self.bounds) == 1 else 1)
        if any(one - since > bound for one, bound in zip(most, bounds, strict=False)):
            raise ValueError(
                f"At most {', '.join(map(str, self.bounds or ()))} keys per row and head may be kept, but "
                f"{max(most) - since} are."
            )


class Shrunk(NamedTuple):
    """What storage consists of after some keys have left it.

    Attributes:
        places: `(B, 1 or Hkv, S')` int64, ascending: of those before, empty slots first.
        total: how many keys a row has at most, in all heads, where these have other numbers of them.
    """

    places: torch.Tensor
    total: int | None


class KeptKeys:
    """The keys of a cache layer some of whose keys were dropped.

    A key that is dropped is hidden at once and leaves storage later, when so many tokens have come that no caller takes
    back as many: until then `crop` is exact.

    Attributes:
        seen: how many tokens the layer was ever given, those taken back left out.
        columns: `(B, 1 or Hkv, S)` int32: which of them each stored key is of, ascending; -1 in empty slots, which come
            first. Of size 1 where all kv heads keep the same.
        dropped: likewise: from how many tokens on the key is dropped, a large number if it is not; `None` where no key
            in storage is.
        decisions: the drops whose keys are in storage still.
        carried_out: from how many tokens on the drops hold whose keys have left it.
        held: places that keys take up in each head, on average, as far as the host knows.
        has_empty: whether slots are empty; true where that is not known on the host.
    """

    def __init__(self, stored: int, batch: int, device: torch.device) -> None:
        self.seen = stored
        self.columns = torch.arange(stored, dtype=torch.int32, device=device).repeat(batch, 1, 1)
        self.dropped: torch.Tensor | None = None
        self.decisions: list[Decision] = []
        self.carried_out = 0
        self.held: float = stored
        self.has_empty = False

    @classmethod
    def of_columns(cls, columns: torch.Tensor, seen: int) -> Self:
        """Of a layer that was only ever given the keys of some tokens, of so many that were seen.

        Args:
            columns: `(B, S)` which of them, ascending; -1 of empty slots, which come first.
            seen: their number.
        """
        made = cls(columns.shape[-1], len(columns), columns.device)
        made.columns, made.seen, made.carried_out = columns[:, None].to(torch.int32), seen, seen
        made.has_empty = True
        return made

    def seen_columns(self) -> torch.Tensor:
        """`(B, 1 or Hkv, S)` int64: the column of each stored key, -1 if it is hidden or its slot empty."""
        return (self.columns if self.dropped is None else self.columns.masked_fill(self.dropped != _NEVER, -1)).long()

    def append(self, rows: int) -> None:
        """So many new keys have come, in every head."""
        new = torch.arange(self.seen, self.seen + rows, dtype=torch.int32, device=self.columns.device)
        self.columns = torch.cat([self.columns, new.expand(*self.columns.shape[:2], -1)], dim=-1)
        self.dropped = None if self.dropped is None else F.pad(self.dropped, (0, rows), value=_NEVER)
        self.seen += rows
        self.held += rows

    def drop(self, kept: torch.Tensor, bounds: tuple[int, ...] | None, since: int) -> None:
        """Hide the stored keys that are not among `kept`, `(B, 1 or Hkv, S)` bool.

        It was right before the last `since` tokens came, which stay; of the others, at most `bounds` are among `kept`.
        """
        holds_from = max(0, self.seen - since)
        heads = max(kept.shape[1], self.columns.shape[1])
        self.columns = self.columns.expand(-1, heads, -1)
        now = torch.where(kept | (self.columns >= holds_from), _NEVER, holds_from).to(torch.int32)
        self.dropped = now if self.dropped is None else torch.minimum(self.dropped, now)
        most = None if bounds is None else tuple(bound + self.seen - holds_from for bound in bounds)
        self.decisions.append(Decision(holds_from, self.seen, most))

    def shrink(self, slack: int) -> Shrunk | None:
        """Take out of storage what was dropped before the last `slack` tokens came; `None` if it stays as it is.

        Raises:
            ValueError: more keys are left than a bound said.
        """
        due, dropped = [one for one in self.decisions if one.holds_from <= self.seen - slack], self.dropped
        if not due or dropped is None:
            return None
        latest = max(due, key=lambda decision: decision[:2])
        when, stored, since = latest.holds_from, self.columns.shape[-1], self.seen - latest.seen
        remains = (dropped > when) & (self.columns >= 0)
        sizes, total = None if latest.bounds is None else [min(stored, bound + since) for bound in latest.bounds], None
        least = 0  # keys that are left in some head of some row
        if sizes is None or not waiting.waits(self.columns):
            counts = remains.sum(-1)
            least, most = int(counts.min()), counts.amax(0).tolist()
            latest.check(most, since)
            if sizes is None:
                sizes, total = most, int(counts.sum(-1).max())
            elif len(sizes) == 1:
                sizes = [max(most)]
        total, size = sum(sizes) if total is None else total, max(sizes)
        held = total / len(sizes)
        if not is_worth_moving(self.held, held):
            self.decisions = [latest, *(decision for decision in self.decisions if decision not in due)]
            return None
        self.decisions = [decision for decision in self.decisions if decision not in due]
        self.carried_out, self.held = max(self.carried_out, when), held
        places = remains.to(torch.uint8).argsort(dim=-1, stable=True)[..., stored - size :]
        self.columns = self.columns.masked_fill(~remains, -1).gather(-1, places)
        self.has_empty = least < size
        is_dropped = any(decision.holds_from > when for decision in self.decisions)
        self.dropped = dropped.gather(-1, places) if is_dropped else None
        return Shrunk(places, total if len(sizes) > 1 else None)

    def can_crop(self, removed: int) -> bool:
        """Whether what was seen before the last `removed` tokens came is all still there."""
        return self.seen - removed >= self.carried_out

    def crop(self, removed: int) -> None:
        """The last `removed` keys are taken back, and with them whatever was dropped since they came."""
        left = self.columns.shape[-1] - removed
        self.seen -= removed
        self.held -= removed
        self.columns = self.columns[..., :left]
        if self.dropped is not None:
            dropped = self.dropped[..., :left]
            self.dropped = dropped.masked_fill(dropped > self.seen, _NEVER)
        self.decisions = [decision for decision in self.decisions if decision.holds_from <= self.seen]

    def select(self, indices: torch.Tensor) -> None:
        """Keep these sequences, in this order."""
        indices = indices.to(self.columns.device)
        self._change(lambda tensor: tensor[indices])

    def repeat(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.columns = change(self.columns)
        self.dropped = None if self.dropped is None else change(self.dropped)

    def tensors(self) -> list[torch.Tensor]:
        """All tensors that are there."""
        return [self.columns, *([] if self.dropped is None else [self.dropped])]

    def fork(self) -> Self:
        """One that goes on by itself; tensors are shared, for none is written to."""
        twin = copy.copy(self)
        twin.decisions = list(self.decisions)
        return twin


def checked_bounds(
    kept: torch.Tensor,
    shape: tuple[int, int, int],
    owner: str,
    bound: int | tuple[int, ...] | None,
    slack: int,
    since: int,
) -> tuple[int, ...] | None:
    """One bound, or one for each head, as `TrackedLayer.keep` is given it; ValueError if anything does not fit.

    Args:
        kept: which keys.
        shape: `(B, Hkv, S)` of those that are stored.
        owner: who decides.
        bound: of how many are kept.
        slack: as there.
        since: as there.

    Raises:
        NotImplementedError: other heads are stored than attended to.
    """
    batch, heads, stored = shape
    if kept.dim() == 3 and kept.shape[1] not in (1, heads):
        raise not_as_attended(owner, kept.shape[1], heads)
    if kept.dtype != torch.bool or (*kept.shape,) not in {(batch, 1, stored), shape}:
        raise ValueError(
            f"{owner}: which of {stored} keys to keep is told by bools (B, 1 or Hkv, S) = ({batch}, 1 or {heads}, "
            f"{stored}), got {kept.dtype} {(*kept.shape,)}."
        )
    bounds = (bound,) if isinstance(bound, int) else bound
    if min(slack, since, *(bounds or (0,))) < 0:
        raise ValueError(f"{owner}: slack, since and bound must not be negative, got {slack}, {since} and {bound}.")
    if bounds is not None and len(bounds) not in (1, kept.shape[1]):
        raise ValueError(f"{owner}: one bound, or one for each of {kept.shape[1]} heads, is needed, got {bound}.")
    return bounds
