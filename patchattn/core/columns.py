"""What a mask is: which columns there are, what hides them from queries, and which of them the keys of a call are."""

from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch.nn.attention.flex_attention import BlockMask, create_mask

from patchattn_kernels import BlockLists, SinkAndRecent

# Which of all columns there ever were are text, as `(B or 1, columns)` bool; all of them; or nobody told.
Text = torch.Tensor | Literal["all", "unknown"]
Keep = torch.Tensor | SinkAndRecent | BlockLists
Form = Literal["bool", "added", "tokens", "blocks"]


@dataclass(frozen=True, eq=False)
class Columns:
    """What `Mask` is made of, for the modules that it is made with.

    Attributes:
        given: what the model passed: `None`, bool or added numbers `(B or 1, H or 1, Tq or 1, Tk)`, tokens `(B, Tk)`,
            or a BlockMask.
        form: what the base implementation takes: a bool mask, one that is added to logits, tokens and the causal flag
            (flash attention), or a BlockMask (flex attention).
        batch, heads, queries, keys: B, H, Tq, Tk.
        columns: how many keys there ever were.
        device: of the call.
        dtype: of masks that are made to be added.
        pairs: a dense mask over the columns, as `given`, or a BlockMask; else the structure below says all.
        real_columns: `(B or 1, columns)` bool: what is text rather than padding, where it is known.
        causal: no key after a query's own is seen.
        window: only keys less than so many real keys away from a query's own are seen.
        sequence: `(columns,)` number of the sequence each column is of, where one row holds several.
        own: column of the first query's own key; of every query's `(B or 1, Tq)`; or `None`: not told.
        is_cross: keys are of another sequence than queries.
        dropped: columns before the first key, which are in the cache no longer.
        text: which of all columns are text, those that were dropped included, as the model was told.
        unsure: whether columns that a window hides from all queries may be padding, of which nobody told.
        uncounted: whether nobody knows how many real ones came before the others; sinks and ranks are then refused.
        restarts: where a dense mask may begin a text behind another: anywhere, nowhere, or `(B or 1, Tq)` bool at which
            queries.
        starts: `(B or 1, columns)` bool: where it does, if it is of some rows of a dense mask, or the call tells it.
        index: `(B or 1, 1 or Hkv, Tk)` column of each key, ascending, -1 of empty slots, which come first; `None`: key
            j is column `dropped + j`. A head dimension of 1 says "the same in all heads".
        has_empty: whether there are empty slots; true where that is not known on the host.
        extra: keys in front of all others that are of no column, and that every query sees.
        keeps: what it was narrowed by.
        fault: why it cannot be told what is seen; asking for it raises this.
        changed: whether it is another one than the model passed.
    """

    given: torch.Tensor | BlockMask | None
    form: Form | None
    batch: int
    heads: int
    queries: int
    keys: int
    columns: int
    device: torch.device
    dtype: torch.dtype
    pairs: torch.Tensor | BlockMask | None = None
    real_columns: torch.Tensor | None = None
    causal: bool = False
    window: int | None = None
    sequence: torch.Tensor | None = None
    own: int | torch.Tensor | None = None
    is_cross: bool = False
    dropped: int = 0
    text: Text = "unknown"
    unsure: bool = False
    uncounted: bool = False
    restarts: torch.Tensor | bool = True
    starts: torch.Tensor | None = None
    index: torch.Tensor | None = None
    has_empty: bool = False
    extra: int = 0
    keeps: tuple[Keep, ...] = ()
    fault: str | None = None
    changed: bool = False
    # What was found, by name, as cached_property does not compile; "columns": what all masks over these have in common.
    _memo: dict[Any, Any] = field(default_factory=dict, init=False)

    def _check(self) -> None:
        if self.fault is not None:
            raise NotImplementedError(self.fault)

    def _pairs(self) -> torch.Tensor:
        """`(B or 1, H or 1, Tq, columns)` the dense mask, bool or added; a BlockMask becomes one."""
        if isinstance(self.pairs, torch.Tensor):
            return self.pairs
        if "pairs" not in self._memo:
            mask, size = cast(BlockMask, self.pairs), self.columns - self.dropped
            batch, heads = mask.shape[:2]
            made = create_mask(mask.mask_mod, batch, heads, self.queries, size, device=str(self.device))
            self._memo["pairs"] = made
        return self._memo["pairs"]

    def _of_keys(self, columns: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """`(B or 1, 1 or Hkv, Tk)` of what is said by column, `(B or 1, columns)`."""
        places = self._places(index)
        shape = (max(len(columns), len(places)), places.shape[1], -1)
        return columns[:, None].expand(shape).gather(-1, places.expand(shape))

    def _places(self, index: torch.Tensor) -> torch.Tensor:
        """`index` on the axis of a dense mask, 0 of empty slots."""
        return (index - self.dropped).clamp(min=0)

    @property
    def _is_one_text(self) -> bool:
        """Whether every column is real and of one text, as structure alone says: column j then has rank j + 1."""
        structure = (self.pairs, self.real_columns, self.sequence)
        return not self.dropped and all(part is None for part in structure)

    @property
    def _has_past(self) -> bool:
        """Whether a dense mask has columns before the first query's own, as far as the host knows."""
        return self._knows_own and not (isinstance(self.own, int) and self.own <= 0)

    @property
    def _window_hides(self) -> bool:
        """Whether the window may hide keys from all queries, which a dense mask then shows to none."""
        if self.window is None or not self._knows_own:
            return False
        return not isinstance(self.own, int) or self.own >= self.window

    @property
    def _knows_own(self) -> bool:
        return self.own is not None or (self.causal and not self.is_cross)
