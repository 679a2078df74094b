"""How a growing cache layer holds its keys and values: in place, and the first ones in a form that takes up less."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from .compact import Compact, Ragged
from .room import Room, may_append


class StoredLayer(CacheLayerMixin):
    """A layer of a kv cache whose keys and values lie in memory as it suits; among its bases, the plain class is next.

    Attributes:
        grows: whether it is a dynamic layer that keeps all keys.
        room: where new keys are written without copying the earlier ones; `None` before the second call.
        first: the earliest keys and values, where they are held in another form; `keys` and `values` are then those
            behind them. Attention is given both as one.
    """

    keys: Any
    values: Any
    grows: bool
    room: Room | None
    first: Compact | None

    @property
    def stored(self) -> int:
        """How many places for keys there are in each head, empty slots included."""
        behind = self.keys.shape[-2] if isinstance(self.keys, torch.Tensor) and self.keys.dim() == 4 else 0
        return behind + (0 if self.first is None else self.first.slots)

    def append(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """All keys and values with new ones `(B, Hkv, T, D)`."""
        is_filled = self.grows and self.is_initialized and self.keys.numel() > 0
        if is_filled and may_append((self.keys, self.values), (keys, values)):
            rows = keys.shape[-2]
            if self.room is None or not self.room.goes_on(self.keys, self.values, rows):
                self.room = Room(self.keys, self.values, rows)
            self.keys, self.values = held = self.room.append(keys, values)
        else:
            self.room = None
            held = super().update(keys, values, *args, **kwargs)
        if self.first is None:
            return held
        return tuple(torch.cat(pair, dim=2) for pair in zip(self.first.whole(), held, strict=True))

    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values `(B, Hkv, S, D)`."""
        if self.first is None:
            return self.keys, self.values
        first = self.first.whole()
        keys, values = (torch.cat(pair, dim=2) for pair in zip(first, (self.keys, self.values), strict=True))
        return keys, values

    def gather(self, places: torch.Tensor) -> None:
        """Hold those in these places `(B, 1 or Hkv, S')` alone, in this order."""
        keys, values = self.whole()
        every = places.expand(-1, keys.shape[1], -1)[..., None].to(keys.device)
        self.keys, self.values = (each.gather(2, every.expand(-1, -1, -1, each.shape[-1])) for each in (keys, values))
        self.room = self.first = None

    def hold_by_length(self, filled: torch.Tensor, newest: int, most: int) -> None:
        """Leave out empty slots, where that saves much.

        Args:
            filled: `(B, Hkv, S)` bool, the empty ones first: which places hold a key.
            newest: so many last places are held as they are.
            most: how many of the others a row has at most, in all heads.
        """
        heads, count = self.keys.shape[1], filled.shape[-1] - newest
        if count > 0 and 16 * most <= 15 * heads * count:
            earlier = filled[..., :count].to(self.keys.device)
            self.hold_first(Ragged.of(self.keys[:, :, :count], self.values[:, :, :count], earlier, most))

    def hold_first(self, first: Compact) -> None:
        """Hold the earliest keys and values in this form."""
        count = first.slots
        self.keys, self.values = (each[:, :, count:].clone() for each in (self.keys, self.values))
        self.room, self.first = None, first

    def change_first(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """As `Compact.changed`, where there is one; what is written behind it is not where it was."""
        self.room = None
        self.first = None if self.first is None else self.first.changed(change)
