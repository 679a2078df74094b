"""Keys and values in forms that take up less than a rectangle: as many of each head as it keeps, or fewer channels."""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch


@dataclass(frozen=True, eq=False)
class Compact:
    """Keys and values of some places of a cache layer; its tensors are `(B, ...)`, and none is written to."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    @abstractmethod
    def slots(self) -> int:
        """Number of places P in each head."""

    @abstractmethod
    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `(B, Hkv, P, D)`."""

    def held(self) -> list[torch.Tensor]:
        """All tensors that are there for it."""
        return [value for value in vars(self).values() if isinstance(value, torch.Tensor)]

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """One of other sequences, or in another place."""
        tensors = {name: change(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **tensors)


@dataclass(frozen=True, eq=False)
class Ragged(Compact):
    """Of every row and kv head another number, one head behind the other: `(B, R, D)`, without the empty slots.

    Attributes:
        counts: `(B, Hkv)` how many each head has. They are the last of its places; those before them are empty.
        places: how many places the rectangle has in each head.
    """

    counts: torch.Tensor
    places: int

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor, filled: torch.Tensor, size: int) -> Self:
        """Take up those of a rectangle `(B, Hkv, P, D)` that are `filled`, `(B, Hkv, P)` bool, the empty ones first.

        Args:
            keys: of the rectangle.
            values: likewise.
            filled: which there are.
            size: how many there are in a row, in all heads, at most.
        """
        where = filled.flatten(1).to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :size]
        keys, values = (tensor.flatten(1, 2).gather(1, _along(where, tensor)) for tensor in (keys, values))
        return cls(keys, values, counts=filled.sum(-1), places=filled.shape[-1])

    @property
    def slots(self) -> int:
        return self.places

    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        batch, size = self.keys.shape[:2]
        ends = self.counts.cumsum(-1)
        slot = torch.arange(self.places, device=ends.device)
        where = (ends[..., None] - self.places + slot).clamp(min=0)  # of empty slots that of some key, which is hidden
        where = where + torch.arange(batch, device=ends.device)[:, None, None] * size
        shape, rows = where.shape, where.flatten().to(self.keys.device)
        keys, values = (
            tensor.flatten(0, 1).index_select(0, rows).unflatten(0, shape) for tensor in (self.keys, self.values)
        )
        return keys, values


@dataclass(frozen=True, eq=False)
class Narrow(Compact):
    """With some channels of each row and kv head alone: keys `(B, Hkv, P, D')`, values whole.

    Attributes:
        channels: `(B, Hkv, D')` int64, which of a key's they are; the others read as zero.
        width: D, how many a key has.
    """

    channels: torch.Tensor
    width: int

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor, channels: torch.Tensor, width: int, owner: str) -> Self:
        """Take up these channels, of `width`, of keys `(B, Hkv, P, D)`.

        Raises:
            NotImplementedError: attention has other heads or channels than are stored.
        """
        attended, stored = (channels.shape[1], width), (keys.shape[1], keys.shape[-1])
        if attended != stored:
            raise not_as_attended(owner, attended, stored)
        channels = channels.to(keys.device)
        where = channels[:, :, None].expand(-1, -1, keys.shape[2], -1)
        return cls(keys.gather(-1, where), values.clone(), channels, keys.shape[-1])

    @property
    def slots(self) -> int:
        return self.keys.shape[2]

    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        where = self.channels[:, :, None].expand_as(self.keys)
        return self.keys.new_zeros(*self.keys.shape[:-1], self.width).scatter_(-1, where, self.keys), self.values


def _along(where: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return where[..., None].expand(-1, -1, tensor.shape[-1]).to(tensor.device)


def not_as_attended(owner: str, attended: object, stored: object) -> NotImplementedError:
    """What to raise where a kv cache stores something that keys are made of, such as latents."""
    return NotImplementedError(
        f"{owner} chooses by kv heads and channels of keys, of which attention has {attended} where its kv cache "
        f"stores {stored}: keys are made of what is stored there, of which nothing can be dropped like that."
    )
