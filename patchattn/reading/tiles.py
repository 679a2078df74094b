"""Queries and keys in blocks by their columns, or by their places in texts: a call may begin anywhere in a block."""

import torch
import torch.nn.functional as F

from patchattn_kernels import BlockLists, lists_from_mask

from ..core import ranks
from ..core.mask import Mask


class RowGrid:
    """The queries of a call at their own columns, from the start of the block on in which the first one lies.

    Attributes:
        place: `(B or 1, Tq)` where each query lies.
        block: queries of a block.
        count: blocks that are there, of which those at the end may be empty.

    Raises:
        NotImplementedError: nothing says which key is a query's own.
    """

    def __init__(self, mask: Mask, block: int) -> None:
        self.mask, self.block = mask, block
        own = ranks.own(mask)
        self.place = own - own[:, :1] // block * block
        self.starts_a_block = isinstance(mask.own, int) and mask.own % block == 0
        self.count = -(-mask.queries // block) + (0 if self.starts_a_block else 1)

    def spread(self, rows: torch.Tensor) -> torch.Tensor:
        """`(B, h, count * block, N)` of what is said of queries `(B or 1, h, Tq, N)`; zeros where there is none."""
        batch = max(len(rows), len(self.place))
        rows = rows.expand(batch, -1, -1, -1)
        place = self.place[:, None, :, None].expand(rows.shape)
        return rows.new_zeros(*rows.shape[:2], self.count * self.block, rows.shape[3]).scatter(2, place, rows)

    def seen(self, rows: int, keys: int) -> torch.Tensor:
        """`(B or 1, 1 or H, count * block / rows, ceil(Tk / keys))` bool: in which tiles of so many text queries and so
        many keys a query sees a key."""
        pairs = self.spread(self.mask.seen() & self.mask.real()[:, None, :, None])
        padded = F.pad(pairs, (0, -pairs.shape[-1] % keys))
        return padded.unflatten(3, (-1, keys)).any(dim=4).unflatten(2, (-1, rows)).any(dim=3)

    def keep(self, blocks: torch.Tensor, size: int) -> torch.Tensor | BlockLists:
        """What a selector gives, of the blocks of `size` keys that each block of queries reads.

        Args:
            blocks: bool `(B, H, count, ceil(Tk / size))`.
            size: keys of a block.
        """
        if self.starts_a_block:
            return lists_from_mask(blocks, self.block, size)
        number = (self.place // self.block)[:, None, :, None].expand(*blocks.shape[:2], -1, blocks.shape[3])
        return blocks.gather(2, number).repeat_interleave(size, dim=-1)[..., : self.mask.keys]


class TextRows:
    """The queries of a call in blocks that are counted from the start of each text; padding is in none.

    Attributes:
        number: `(B or 1, Tq)` that of each query's block, in this call.
        count: how many there are at most.
        real: `(B or 1, Tq)` bool: which queries are text.

    Raises:
        NotImplementedError: nothing says which key is a query's own.
    """

    def __init__(self, mask: Mask, block: int) -> None:
        self.real = mask.real()
        begins = self.real & ((mask.row_places() - 1) % block == 0)
        self.number = (begins.cumsum(dim=-1) - begins[:, :1].long()).clamp(min=0)
        self.count = min(mask.queries, mask.queries // block + 2) if ranks.starts(mask) is None else mask.queries

    def highest(self, rows: torch.Tensor, fill: float) -> torch.Tensor:
        """`(B, h, count, N)` the highest of each block, of numbers `(B, h, Tq, N)`; at least `fill`."""
        shown = torch.where(self.real[:, None, :, None], rows, fill)
        index = self.number[:, None, :, None].expand(shown.shape)
        return shown.new_full((*shown.shape[:2], self.count, shown.shape[3]), fill).scatter_reduce(
            2, index, shown, "amax"
        )

    def by_row(self, blocks: torch.Tensor) -> torch.Tensor:
        """`(B, h, Tq, N)` of what is said of blocks `(B, h, count, N)`."""
        return blocks.gather(2, self.number[:, None, :, None].expand(*blocks.shape[:2], -1, blocks.shape[3]))
