"""Some of the keys of a call: which ones, and what is said of every key, of these alone."""

from dataclasses import dataclass, replace

import torch

from ..cache import waiting
from .keeping import of_query_heads


@dataclass(frozen=True, eq=False)
class Places:
    """Some of the keys of a call, in each kv head; the same for all its queries.

    Attributes:
        index: `(B or 1, 1 or Hkv, N)` int: numbers of keys, or of pages of them, ascending and none twice. A head
            dimension of 1 says "the same in all heads". Without `counts`, -1 says that a slot is empty, and empty slots
            come first.
        counts: `(B or 1, 1 or Hkv)` int: how many of the N are meant, the first ones, where sets differ in size;
            `None`: all.
        block: length of a page in keys: page p is the keys from `p * block` on, the last one may be cut off by the end.
            1: `index` is of keys.
        has_empty: whether slots are empty, where there are no counts; true where that is not known without asking the
            device.
        of_heads: `(B or 1, H, Tk)` bool: what each query head reads of all keys, where not all heads of a kv head read
            the same; the places are then what any of them does.

    Raises:
        ValueError: `index` or `counts` have other dimensions, or `block` is less than 1.
        TypeError: they are not integers.
    """

    index: torch.Tensor
    counts: torch.Tensor | None = None
    block: int = 1
    has_empty: bool = False
    of_heads: torch.Tensor | None = None

    def __post_init__(self) -> None:
        named = {
            "index": (self.index, "(B or 1, 1 or kv heads, N)"),
            "counts": (self.counts, "(B or 1, 1 or kv heads)"),
        }
        for name, (tensor, shape) in named.items():
            if tensor is None:
                continue
            if tensor.is_floating_point() or tensor.dtype == torch.bool:
                raise TypeError(f"Places are told by integers, got {name} of {tensor.dtype}.")
            if tensor.dim() != shape.count(",") + 1:
                raise ValueError(f"Expected {name} {shape}, got {tuple(tensor.shape)}.")
        if self.block < 1:
            raise ValueError(f"A page has at least one key, got block={self.block}.")

    def of_keys(self, keys: int) -> "Places":
        """The same places, of `keys` keys, key by key: with neither counts nor pages nor `of_heads`, empty slots first.

        Raises:
            IndexError: there is no such key or page; told on a CPU alone, for no other device is waited for.
        """
        index, device = self.index.long(), self.index.device
        if self.counts is not None:
            is_meant = torch.arange(index.shape[-1], device=device) < self.counts[..., None]
            index = torch.where(is_meant, index, -1)
        if not waiting.waits(index) and index.numel() and not torch.compiler.is_compiling():
            last = int(index.max())
            if last * self.block >= keys:
                raise IndexError(f"Key or page {last} (block={self.block}) was asked for in a call with {keys} keys.")
        if self.counts is None and self.block == 1:
            return replace(self, of_heads=None)
        if self.block > 1:
            columns = index[..., None] * self.block + torch.arange(self.block, device=device)
            index = torch.where((index[..., None] < 0) | (columns >= keys), -1, columns).flatten(-2)
        has_empty = self.has_empty or self.counts is not None or keys % self.block != 0
        return Places(index.sort(dim=-1).values if has_empty else index, has_empty=has_empty)

    def kept(self, keys: int) -> torch.Tensor:
        """`(B or 1, 1 or Hkv or H, Tk)` bool: which of `keys` keys are meant.

        Raises:
            IndexError: as `of_keys`.
        """
        index = self.of_keys(keys).index
        if self.of_heads is not None:
            return self.of_heads
        found = torch.zeros(*index.shape[:2], keys + 1, dtype=torch.bool, device=index.device)
        return found.scatter(-1, torch.where(index < 0, keys, index), True)[..., :keys]


def taken(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`(B, Hkv, K, D)` some of the keys or values `(B, Hkv, Tk, D)`; those of empty slots are any.

    Rows of one matrix are taken several times faster than gathered, and no layout that caches or projections give is
    copied for it.
    """
    dim = tensor.shape[-1]
    if tensor.stride(-1) != 1 or any(step % dim for step in tensor.stride()[:3]):
        tensor = tensor.contiguous()
    sizes, steps = tensor.shape[:3], [step // dim for step in tensor.stride()[:3]]
    lines = 1 + sum(step * (size - 1) for step, size in zip(steps, sizes, strict=True))
    batch, groups = (torch.arange(size, device=tensor.device) for size in sizes[:2])
    places = (batch * steps[0])[:, None, None] + (groups * steps[1])[:, None] + index.clamp(min=0) * steps[2]
    return tensor.as_strided((lines, dim), (dim, 1)).index_select(0, places.flatten()).view(*places.shape, dim)


def of_places(fact: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`(B, h, K)` of what is said of every key, `(B, 1 or Hkv or H, Tk)`; of empty slots anything."""
    return gathered(fact, index if fact.shape[1] == 1 else of_query_heads(index, fact.shape[1]))


def gathered(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Entries `(..., K)` of `(..., N)` at places that are broadcast to it; those of empty slots are any."""
    shape = torch.broadcast_shapes(tensor.shape[:-1], index.shape[:-1])
    return tensor.expand(*shape, -1).gather(-1, index.clamp(min=0).expand(*shape, -1))
