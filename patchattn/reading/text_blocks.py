"""Blocks of queries and of keys that are counted from the start of each text."""

from typing import NamedTuple

import torch

from patchattn_kernels import BlockLists, lists_from_mask
from patchattn_kernels.rows import full_precision

from ..core import ranks
from ..core.mask import Mask
from .lines import Texts
from .selection import plain_own
from .whole import keys_so_far


class TextBlocks(NamedTuple):
    """N blocks, numbered through the texts of a row; some at the end may be empty.

    Attributes:
        of_keys: `(B or 1, Tk)` number of each key's block.
        of_rows: `(B or 1, Tq)` number of each query's block, which is that of its own key.
        has_keys: `(B or 1, N, Tk)` bool: which keys are in a block.
        has_rows: `(B or 1, N, Tq)` bool: which queries of this call are.
        text: `(B or 1, N)` number of each block's text, as `Texts` has them; -1 of empty ones.
    """

    of_keys: torch.Tensor
    of_rows: torch.Tensor
    has_keys: torch.Tensor
    has_rows: torch.Tensor
    text: torch.Tensor

    @property
    def together(self) -> torch.Tensor:
        """`(B or 1, N, N)` bool: which blocks are of one text."""
        return (self.text[:, :, None] == self.text[:, None]) & (self.text >= 0)[:, None]

    def sums(self, of_keys: torch.Tensor) -> torch.Tensor:
        """`(B, H, N)` of what is said of keys, `(B, H, Tk)`."""
        return (of_keys[:, :, None] @ self.has_keys.mT[:, None].to(of_keys.dtype)).squeeze(2)

    def mean_keys(self, key: torch.Tensor) -> torch.Tensor:
        """`(B, Hkv, N, D)` in float32 at least; zeros of empty blocks."""
        return _means(self.has_keys, key)

    def mean_queries(self, query: torch.Tensor) -> torch.Tensor:
        """`(B, H, N, D)` in float32 at least; zeros of blocks without queries in this call."""
        return _means(self.has_rows, query)

    def keep(self, blocks: torch.Tensor, mask: Mask, size: int) -> torch.Tensor | BlockLists:
        """What a selector gives, of the blocks of keys that each block of queries reads, bool `(B, H, N, N)`."""
        own = plain_own(mask)
        if own is not None and own % size == 0:
            count = -(-mask.queries // size)
            return lists_from_mask(blocks[:, :, own // size : own // size + count], size, size)
        batch, heads, count = blocks.shape[:3]
        rows, keys = (
            number.expand(batch, -1)[:, None, :, None].expand(-1, heads, -1, -1)
            for number in (self.of_rows, self.of_keys)
        )
        by_row = blocks.gather(2, rows.expand(-1, -1, -1, count))
        return by_row.gather(3, keys.mT.expand(-1, -1, mask.queries, -1))


def text_blocks(mask: Mask, texts: Texts, size: int) -> TextBlocks:
    """The blocks of a call's rows, of `size` tokens.

    Raises:
        NotImplementedError: nothing says which key is a query's own.
    """
    is_one = ranks.starts(mask) is None
    number = torch.arange(-(-mask.keys // size) if is_one else mask.keys, device=mask.device)
    real = keys_so_far(mask)[:, 0]
    begins = real & ((mask.key_places()[:, 0] - 1) % size == 0)
    of_keys = (begins.long().cumsum(dim=-1) - 1).clamp(min=0)
    of_rows = ranks.taken(of_keys, ranks.own(mask))
    has_keys = (of_keys[:, None] == number[:, None]) & real[:, None]
    has_rows = (of_rows[:, None] == number[:, None]) & mask.real()[:, None]
    text = torch.where(has_keys, texts.of_keys[:, None], -1).amax(dim=-1)
    return TextBlocks(of_keys, of_rows, has_keys, has_rows, text)


def _means(members: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    tokens = full_precision(tokens)
    weights = members[:, None].to(tokens.dtype)
    return (weights @ tokens) / weights.sum(dim=-1, keepdim=True).clamp(min=1)
