"""Which keys each query of a call sees: read once off what the model passed, then narrowed, gathered or extended."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask

from patchattn_kernels import AttentionRule, KeyCounts, SinkAndRecent, key_counts

from . import keeping, ranks, rendering
from .columns import Columns
from .columns import Form as Form
from .columns import Keep as Keep


@dataclass(frozen=True, eq=False)
class Mask(Columns):
    """Which keys queries see. B sequences, H query heads, Tq queries, Tk keys.

    Keys are told by their *column*, their place among all keys there ever were of a sequence: a cache that forgets, a
    gather of some keys and a layer whose tokens were pruned all are "key j is column `index[j]`". Nothing here waits
    for a device. What the base implementation is given stays as it came until something is changed.

    Its attributes are those of `Columns`.
    """

    # --- what is seen -------------------------------------------------------------------------------------------------

    def seen(self) -> torch.Tensor:
        """`(B or 1, H or 1, Tq, Tk)` bool: which keys each query sees. As large as one head's attention, or all heads'.

        Raises:
            NotImplementedError: nothing says what the base implementation does without a mask.
        """
        return keeping.seen(self)

    def counts(self) -> torch.Tensor:
        """`(B or 1, Tq)` number of keys each query sees; `(B or 1, Tq, H)` where heads differ. Padding may see none.

        Raises:
            NotImplementedError: as `seen`.
        """
        found: torch.Tensor | None = self._memo.get("counts")
        if found is None:
            found = self._memo["counts"] = self._found_counts()
        return found

    def log_counts(self, dtype: torch.dtype) -> torch.Tensor:
        """Natural logarithm of `counts`, in their shape; a query that sees no key counts as if it saw one.

        Raises:
            NotImplementedError: as `seen`.
        """
        found: torch.Tensor | None = self._memo.get(dtype)
        if found is None:
            found = self._memo[dtype] = ranks.log_counts(self.counts(), dtype)
        return found

    def _found_counts(self) -> torch.Tensor:
        self._check()
        if self.pairs is not None or self.index is not None or self.keeps:
            return self.seen().sum(-1).transpose(1, 2).squeeze(-1)
        if self.sequence is not None:
            own = ranks.own(self)
            of_own = self.sequence[own]
            first, end = (torch.searchsorted(self.sequence, of_own, right=right) for right in (False, True))
            order, total = own - first + 1, end - first
        elif self.real_columns is not None:
            real = self.real_columns.long()
            total = real.sum(-1, keepdim=True)
            counted = self.causal or self.window is not None
            order = ranks.by_row(self, real.cumsum(-1)) if counted else total
            order = order.expand(-1, self.queries)
        else:
            total = torch.full((1, self.queries), self.columns - self.dropped, device=self.device)
            order = ranks.own(self) + 1 if self.causal or self.window is not None else total
        counts = order if self.causal else total.expand_as(order)
        if self.window is not None:
            counts = torch.minimum(counts, order + self.window - 1) - (order - self.window).clamp(min=0)
        return counts + self.extra if self.extra else counts

    def key_counts(self) -> KeyCounts:
        """How many text queries see each key, `(B or 1, H or 1, Tk)`; found once for all layers that share the mask.

        Raises:
            NotImplementedError: as `seen`.
        """
        found: KeyCounts | None = self._memo.get("key counts")
        if found is None:
            counts = key_counts(self.rule(), self.queries, self.keys, self.device, self.real())
            found = KeyCounts(*(count if count.dim() == 3 else count[:, None] for count in counts))
            self._memo["key counts"] = found
        return found

    def added(self) -> torch.Tensor | None:
        """`(B or 1, H or 1, Tq, Tk)` what a dense mask adds to the logits of these keys, if it is one that does."""
        return keeping.added(self)

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
        return ranks.behind_extra(self, ranks.real_keys(self), value=True)

    def key_order(self) -> torch.Tensor:
        """`(B or 1, 1 or Hkv, Tk)` int: rank of each key among all real ones there ever were, the first is 1.

        Of what is not real, that of the last real key before it; 0 of empty slots and of extra keys. With a dense mask
        the real ones are those that some query of the call sees, and the earlier ones that the model was told are text.

        Raises:
            NotImplementedError: it is not known how many there were (`uncounted`).
        """
        ranks.refuse_uncounted(self)
        return ranks.key_order(self)

    def key_places(self) -> torch.Tensor:
        """The same from the start of each key's own text, where a row holds several: for sinks, numbers of tokens."""
        ranks.refuse_uncounted(self)
        return ranks.key_places(self)

    def row_order(self) -> torch.Tensor:
        """`(B or 1, Tq)` int: rank of each query's own key among all real ones there ever were.

        Raises:
            NotImplementedError: a query has no key of its own, or it is not known which; or as `key_order`.
        """
        ranks.refuse_uncounted(self)
        return ranks.row_order(self)

    def row_places(self) -> torch.Tensor:
        """The same from the start of each query's own text; raises as `row_order`."""
        ranks.refuse_uncounted(self)
        return ranks.row_places(self)

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
        return self._over_same_columns(keeps=(*self.keeps, keep))

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
            columns = torch.where(index < 0, -1, index + self.dropped) if self.dropped else index
        else:
            held, groups = self.index, max(self.index.shape[1], index.shape[1])
            batch = max(len(held), len(index))
            held, index = (t.expand(batch, groups, -1) for t in (held, index))
            columns = held.gather(-1, index.clamp(min=0)).masked_fill(index < 0, -1)
        return self._over_same_columns(
            index=columns, keys=columns.shape[-1], has_empty=has_empty or self.has_empty, keeps=keeps
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
        return self._over_same_columns(extra=self.extra + count, keys=self.keys + count, keeps=keeps)

    def _over_same_columns(self, **changes: Any) -> "Mask":
        """Another mask over the same columns and queries; what was found of them, or will be, holds in both."""
        other = replace(self, **changes, changed=True)
        other._memo["columns"] = self._memo.setdefault("columns", {})
        return other

    # --- for whoever computes -----------------------------------------------------------------------------------------

    def rendered(self) -> tuple[torch.Tensor | BlockMask | None, dict[str, Any]]:
        """The mask and further keyword arguments for the base implementation; what came in where nothing was changed.

        Raises:
            NotImplementedError: the base implementation cannot be told, as flash attention of sets that differ between
                heads; the message names it.
        """
        return rendering.rendered(self) if self.changed or self.form == "blocks" else (self.given, {})

    def rule(self, scaling: float = 1.0, **terms: Any) -> AttentionRule:
        """The mask in the terms of `patchattn_kernels`; `terms` are the other fields of a rule.

        Raises:
            NotImplementedError: as `seen`.
        """
        return AttentionRule(scaling, **rendering.structure(self), **terms)
