"""Which keys each query of a call sees: read once off what the model passed, then narrowed, gathered or extended."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_mask

from patchattn_kernels import AttentionRule, SinkAndRecent
from patchattn_kernels.rows import seen_by

from . import keeping, ranks, rendering
from .keeping import Keep as Keep
from .ranks import Text

Form = Literal["bool", "added", "tokens", "blocks"]


@dataclass(frozen=True, eq=False)
class Mask:
    """Which keys queries see. B sequences, H query heads, Tq queries, Tk keys.

    Keys are told by their *column*, their place among all keys there ever were of a sequence: a cache that forgets, a
    gather of some keys and a layer whose tokens were pruned all are "key j is column `index[j]`". Nothing here waits
    for a device. What the base implementation is given stays as it came until something is changed.

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
        starts: `(B or 1, columns)` bool: where it does, if it is of some rows of a dense mask.
        index: `(B or 1, 1 or Hkv, Tk)` column of each key, ascending, -1 of empty slots, which come first; `None`: key
            j is column `dropped + j`. A head dimension of 1 says "the same in all heads".
        has_empty: whether there are empty slots; true where that is not known on the host.
        extra: keys in front of all others that are of no column, and that every query sees.
        keeps: what it was narrowed by.
        fault: why it cannot be told what is seen; asking for it raises this.
        changed: whether it is another one than the model passed.
    """

    given: Any
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
    _memo: dict[str, torch.Tensor] = field(default_factory=dict, init=False)  # cached_property does not compile

    # --- what is seen -------------------------------------------------------------------------------------------------

    def seen(self) -> torch.Tensor:
        """`(B or 1, H or 1, Tq, Tk)` bool: which keys each query sees. As large as one head's attention, or all heads'.

        Raises:
            NotImplementedError: nothing says what the base implementation does without a mask.
        """
        seen = self._before_keeps()
        for keep in self.keeps:
            seen = seen & keeping.as_mask(keep, self)
        return seen

    def counts(self) -> torch.Tensor:
        """`(B or 1, Tq)` number of keys each query sees; `(B or 1, Tq, H)` where heads differ. Padding may see none.

        Raises:
            NotImplementedError: as `seen`.
        """
        self._check()
        if self.pairs is not None or self.index is not None or self.keeps:
            return self.seen().sum(-1).transpose(1, 2).squeeze(-1)
        if self.sequence is not None:
            own = ranks.own(self)
            of_own = self.sequence[own]
            first, end = (torch.searchsorted(self.sequence, of_own, right=right) for right in (False, True))
            order, total = own - first + 1, end - first
        else:
            real = ranks.real(self).long()
            total = real.sum(-1, keepdim=True)
            order = self._by_row(real.cumsum(-1)) if self.causal or self.window is not None else total
            order = order.expand(-1, self.queries)
        counts = order if self.causal else total.expand_as(order)
        if self.window is not None:
            counts = torch.minimum(counts, order + self.window - 1) - (order - self.window).clamp(min=0)
        return counts + self.extra

    def real(self) -> torch.Tensor:
        """`(B or 1, Tq)` bool: which queries are text rather than padding.

        A token is padding if it does not see itself, in any head. Where it is not known which key is its own, and in
        cross attention, it is if it sees nothing, as on the left of a padded prompt.
        """
        return ranks.real_rows(self)

    def real_keys(self) -> torch.Tensor:
        """`(B or 1, 1 or Hkv, Tk)` bool: which keys are text: no padding, no slot that is empty or not filled yet.

        In front of them come the extra keys, which are.

        Raises:
            NotImplementedError: of keys that a window hides from all queries it is not known.
        """
        ranks.refuse_uncounted(self, keys=True)
        return F.pad(self._real_keys(), (self.extra, 0), value=True)

    def key_order(self) -> torch.Tensor:
        """`(B or 1, 1 or Hkv, Tk)` int: rank of each key among all real ones there ever were, the first is 1.

        Of what is not real, that of the last real key before it; 0 of empty slots and of extra keys. With a dense mask
        the real ones are those that some query of the call sees, and the earlier ones that the model was told are text.

        Raises:
            NotImplementedError: it is not known how many there were (`uncounted`).
        """
        ranks.refuse_uncounted(self)
        return self._by_key(ranks.order(self))

    def key_places(self) -> torch.Tensor:
        """The same from the start of each key's own text, where a row holds several: for sinks, numbers of tokens."""
        ranks.refuse_uncounted(self)
        return self._by_key(ranks.places(self))

    def row_order(self) -> torch.Tensor:
        """`(B or 1, Tq)` int: rank of each query's own key among all real ones there ever were.

        Raises:
            NotImplementedError: a query has no key of its own, or it is not known which; or as `key_order`.
        """
        ranks.refuse_uncounted(self)
        return self._by_row(ranks.order(self))

    def row_places(self) -> torch.Tensor:
        """The same from the start of each query's own text; raises as `row_order`."""
        ranks.refuse_uncounted(self)
        return self._by_row(ranks.places(self))

    # --- other masks --------------------------------------------------------------------------------------------------

    def narrowed(self, keep: Keep | None) -> "Mask":
        """One that hides more.

        Args:
            keep: what stays visible: bool `(B or 1, 1 or Hkv or H, Tk)` or, by query, `(B or 1, 1 or H, Tq or 1, Tk)`;
                sinks and recent keys; blocks of keys; or `None`: everything, which is this very mask.

        Raises:
            TypeError: it is none of these.
            ValueError: it is of another shape.
        """
        if keep is None:
            return self
        keep = keeping.checked(keep, self)
        if isinstance(keep, SinkAndRecent) and keep.window is not None and self.pairs is None and self.index is None:
            window = keep.window if self.window is None else min(self.window, keep.window)
            return replace(self, window=window, changed=True)
        return replace(self, keeps=(*self.keeps, keep), changed=True)

    def at(self, index: torch.Tensor, *, has_empty: bool) -> "Mask":
        """The mask of some of its keys.

        Args:
            index: `(B or 1, 1 or Hkv, K)` which of its keys, ascending, -1 of empty slots, which come first.
            has_empty: whether there are empty slots; true where that is not known.

        Raises:
            ValueError: an index of another shape.
            NotImplementedError: after `prepended`.
        """
        if index.dim() != 3 or index.shape[0] not in (1, self.batch) or self.heads % index.shape[1]:
            raise ValueError(
                f"Expected an index (B, 1 or kv heads, keys) for {self.batch} sequences and {self.heads} query heads, "
                f"got {tuple(index.shape)}."
            )
        if self.extra:
            raise NotImplementedError("Keys cannot be gathered behind extra ones: gather first, then prepend.")
        keeps = tuple(keeping.gathered(keep, index, self) for keep in self.keeps)
        if self.index is None:
            columns = torch.where(index < 0, -1, index + self.dropped)
        else:
            held, groups = self.index, max(self.index.shape[1], index.shape[1])
            batch = max(len(held), len(index))
            held, index = (t.expand(batch, groups, -1) for t in (held, index))
            columns = held.gather(-1, index.clamp(min=0)).masked_fill(index < 0, -1)
        return replace(
            self,
            index=columns,
            keys=columns.shape[-1],
            has_empty=has_empty or self.has_empty,
            keeps=keeps,
            changed=True,
        )

    def of_rows(self, rows: torch.Tensor) -> "Mask":
        """The mask of some of its queries, `(R,)` or `(B or 1, R)` of their numbers."""
        rows = rows if rows.dim() == 2 else rows[None]
        pairs = self.pairs
        if pairs is not None:
            pairs = keeping.rows_of(self._pairs(), rows)
        return replace(
            self,
            pairs=pairs,
            queries=rows.shape[-1],
            real_columns=self.real_columns if pairs is None else ranks.real(self),
            starts=None if pairs is None else ranks.starts(self),
            restarts=False,
            own=None if self.own is None and not self._knows_own else ranks.taken(ranks.own(self), rows),
            keeps=tuple(keeping.of_rows(keep, rows, self) for keep in self.keeps),
            changed=True,
        )

    def of_heads(self, heads: Sequence[int] | torch.Tensor) -> "Mask":
        """The mask of some of its query heads."""
        chosen = torch.as_tensor(heads, device=self.device)
        pairs, index = self.pairs, self.index
        if pairs is not None and (isinstance(pairs, torch.Tensor) or pairs.shape[1] != 1):
            pairs = self._pairs()
            pairs = pairs if pairs.shape[1] == 1 else pairs.index_select(1, chosen)
        if index is not None and index.shape[1] > 1:
            index = keeping.of_query_heads(index, self.heads).index_select(1, chosen)
        per_head = isinstance(pairs, torch.Tensor) and pairs.shape[1] > 1
        return replace(
            self,
            pairs=pairs,
            real_columns=ranks.real(self) if per_head else self.real_columns,
            index=index,
            heads=len(chosen),
            keeps=tuple(keeping.of_heads(keep, chosen, self) for keep in self.keeps),
            changed=self.changed or per_head,
        )

    def prepended(self, count: int) -> "Mask":
        """The mask with so many extra keys in front, of no column, that every query sees."""
        if count == 0:
            return self
        keeps = tuple(keeping.prepended(keep, count, self) for keep in self.keeps)
        return replace(self, extra=self.extra + count, keys=self.keys + count, keeps=keeps, changed=True)

    # --- for whoever computes -----------------------------------------------------------------------------------------

    def rendered(self) -> tuple[Any, dict[str, Any]]:
        """The mask and further keyword arguments for the base implementation; what came in where nothing was changed.

        Raises:
            NotImplementedError: the base implementation cannot be told, as flash attention of sets that differ between
                heads; the message names it.
        """
        return rendering.rendered(self)

    def rule(self, scaling: float = 1.0, **terms: Any) -> AttentionRule:
        """The mask in the terms of `patchattn_kernels`; `terms` are the other fields of a rule.

        Raises:
            NotImplementedError: as `seen`.
        """
        return AttentionRule(scaling, **rendering.structure(self), **terms)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self.fault is not None:
            raise NotImplementedError(self.fault)

    def _pairs(self) -> torch.Tensor:
        """`(B or 1, H or 1, Tq, columns)` the dense mask, bool or added; a BlockMask becomes one."""
        mask: Any = self.pairs
        if isinstance(mask, torch.Tensor):
            return mask
        if "pairs" not in self._memo:
            (batch, heads), size = mask.shape[:2], self.columns - self.dropped
            made = create_mask(mask.mask_mod, batch, heads, self.queries, size, device=str(self.device))
            self._memo["pairs"] = made
        return self._memo["pairs"]

    def added(self) -> torch.Tensor | None:
        """`(B or 1, H or 1, Tq, Tk)` what a dense mask adds to the logits of these keys, if it is one that does."""
        if not isinstance(self.pairs, torch.Tensor) or not self.pairs.is_floating_point():
            return None
        return F.pad(self._at_keys(self.pairs), (self.extra, 0))

    def _at_keys(self, pairs: torch.Tensor) -> torch.Tensor:
        """What is said by column `(B or 1, H or 1, Tq, columns)` by key, without the extra ones."""
        if self.index is None:
            return pairs
        places = self._places(self.index)
        if places.shape[1] > 1:
            places = keeping.of_query_heads(places, self.heads)
        batch, heads = (max(one, other) for one, other in zip(pairs.shape[:2], places.shape[:2], strict=True))
        places = places[:, :, None].expand(batch, heads, pairs.shape[2], -1)
        return pairs.expand(batch, heads, -1, -1).gather(-1, places)

    def _of_keys(self, columns: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """`(B or 1, 1 or Hkv, Tk)` of what is said by column, `(B or 1, columns)`."""
        places = self._places(index)
        shape = (max(len(columns), len(places)), places.shape[1], -1)
        return columns[:, None].expand(shape).gather(-1, places.expand(shape))

    def _places(self, index: torch.Tensor) -> torch.Tensor:
        """`index` on the axis of a dense mask, 0 of empty slots."""
        return (index - self.dropped).clamp(min=0)

    def _before_keeps(self) -> torch.Tensor:
        self._check()
        if self.pairs is not None:
            seen = self._at_keys(seen_by(self._pairs()))
            if self.index is not None and self.has_empty:
                seen = seen & keeping.of_query_heads(self.index >= 0, self.heads)[:, :, None]
            return F.pad(seen, (self.extra, 0), value=True)
        seen = self._real_keys()[:, :, None].expand(-1, -1, self.queries, -1)
        if self.causal or self.sequence is not None:
            size = self.columns - self.dropped
            key = torch.arange(size, device=self.device)[None, None] if self.index is None else self._places(self.index)
            own = ranks.own(self)
            if self.causal:
                seen = seen & (key[:, :, None] <= own[:, None, :, None])
            if self.sequence is not None:
                seen = seen & (self.sequence[own][:, None, :, None] == self.sequence[key][:, :, None])
        if self.window is not None:
            order = ranks.order(self)
            away = self._by_row(order)[:, None, :, None] - self._by_key(order)[:, :, None, self.extra :]
            seen = seen & (away.abs() < self.window)
        return F.pad(keeping.of_query_heads(seen, self.heads), (self.extra, 0), value=True)

    def _real_keys(self) -> torch.Tensor:
        """`(B or 1, 1 or Hkv, Tk)` bool: which keys are text, as far as is known; without the extra ones."""
        real = ranks.real(self)
        return real[:, None] if self.index is None else self._of_keys(real, self.index) & (self.index >= 0)

    def _by_key(self, columns: torch.Tensor) -> torch.Tensor:
        """`(B or 1, 1 or Hkv, Tk)` numbers by column `(B or 1, columns)` by key: 0 of empty slots and of extra keys."""
        index = self.index
        found = columns[:, None] if index is None else self._of_keys(columns, index).masked_fill(index < 0, 0)
        return F.pad(found, (self.extra, 0))

    def _by_row(self, columns: torch.Tensor) -> torch.Tensor:
        """`(B or 1, Tq)` of what is said by column, `(B or 1, columns)`: that of each query's own."""
        return ranks.taken(columns, ranks.own(self))

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
