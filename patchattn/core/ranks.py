"""Which columns of a mask are text, and their ranks among it: what sinks, recent keys and numbers of tokens count."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from patchattn_kernels.block_lists import UNCOUNTED
from patchattn_kernels.rows import seen_by

from .columns import Columns, Text


class Told(NamedTuple):
    """What a model was told of its tokens, by which a mask of pairs is understood.

    Attributes:
        text: which of all tokens there ever were are text.
        restarts: where a text may begin behind another in one row: anywhere that the mask allows it, nowhere, or
            `(B or 1, T)` bool at which tokens of this call.
    """

    text: Text = "unknown"
    restarts: torch.Tensor | bool = True


NOTHING_TOLD = Told()
# The axis of columns begins behind those that the cache has let go of.


def is_known(text: Text) -> bool:
    """Whether somebody told."""
    return isinstance(text, torch.Tensor) or text != "unknown"


def fitting(told: Told, *, batch: int, dropped: int, own: int | torch.Tensor | None, queries: int, keys: int) -> Told:
    """What of it is about the tokens of a call; the rest is unknown."""
    text, restarts = told
    if isinstance(text, torch.Tensor):
        size = text.shape[1]
        # Slots of a static cache that are not filled yet have no token; all other keys have one each.
        fits = size == keys if own is None else isinstance(own, torch.Tensor) or size >= dropped + own + queries
        text = text if fits and len(text) in (1, batch) else "unknown"
    if isinstance(restarts, torch.Tensor) and tuple(restarts.shape) not in {(1, queries), (batch, queries)}:
        restarts = True
    return Told(text, restarts)


def real(mask: Columns) -> torch.Tensor:
    """`(B or 1, columns)` bool: columns that are text, as far as is known."""
    if mask.real_columns is not None:
        found: torch.Tensor = mask.real_columns
        return found
    return remembered(mask, "real", _found_real, of_columns=True)


def _found_real(mask: Columns) -> torch.Tensor:
    size = mask.columns - mask.dropped
    if mask.pairs is None:
        return torch.ones(1, size, dtype=torch.bool, device=mask.device)
    shown = seen_by(mask._pairs()).flatten(1, 2).any(dim=1)
    if not mask._has_past:
        return shown
    # A token of this call sees itself; an earlier one may be hidden from all queries, and be text.
    key, first = torch.arange(size, device=mask.device), own(mask)[:, :1]
    if isinstance(mask.text, torch.Tensor):
        told = mask.text.to(mask.device).bool()[:, mask.dropped :]
        return shown | (F.pad(told, (0, max(0, size - told.shape[1])))[:, :size] & (key < first))
    if mask.text == "all":
        return shown | (key < first)
    if mask.window is None or not mask._window_hides:
        return shown
    return shown | (key <= first - mask.window)


def real_rows(mask: Columns) -> torch.Tensor:
    """As `Mask.real`."""
    if mask.fault is not None or (mask.is_cross and mask.pairs is None):
        return torch.ones(1, mask.queries, dtype=torch.bool, device=mask.device)
    if mask.pairs is None:
        known = real(mask)
        return known[:, -1:].expand(-1, mask.queries) if mask.own is None else taken(known, own(mask))
    visible = seen_by(mask._pairs()).any(dim=1)
    if mask.is_cross or mask.own is None:
        return visible.any(-1)
    column = own(mask).expand(len(visible), -1)
    return visible.gather(-1, column[..., None]).squeeze(-1)


def own(mask: Columns) -> torch.Tensor:
    """`(B or 1, Tq)` place of each query's own key among the columns.

    Where nobody told, the last row of a causal mask ends at its own.

    Raises:
        NotImplementedError: a query has no key of its own, or it is not known which.
    """
    if isinstance(mask.own, torch.Tensor) and mask.own.dim() == 2:
        return mask.own
    rows = torch.arange(mask.queries, device=mask.device)[None]
    if isinstance(mask.own, int) and mask.own < 0:
        raise NotImplementedError(
            f"{mask.queries} queries meet {mask.queries + mask.own} keys, which are no longer those of single tokens: "
            "there is none of a query's own."
        )
    if mask.own is not None:
        return rows + mask.own
    if mask.is_cross or not mask.causal or mask.pairs is None:
        raise NotImplementedError("It is not known which keys are those of the queries' own tokens.")
    last = seen_by(mask._pairs()[:, :, -1]).flatten(0, 1).any(dim=0)
    end = last.shape[-1] - last.to(torch.uint8).flip(-1).argmax(-1)
    return (rows + end - mask.queries).clamp(min=0)


def order(mask: Columns) -> torch.Tensor:
    """`(B or 1, columns)` int: rank of each column among all real ones there ever were, the first is 1.

    Where the mask is `uncounted` they are right but for a number that they have in common.
    """
    return remembered(mask, "order", _found_order, of_columns=True)


def _found_order(mask: Columns) -> torch.Tensor:
    found = real(mask).long().cumsum(-1)
    if not mask.dropped:
        return found
    told = mask.text.to(mask.device).bool() if isinstance(mask.text, torch.Tensor) else None
    return found + (mask.dropped if told is None else told[:, : mask.dropped].sum(-1, keepdim=True))


def places(mask: Columns) -> torch.Tensor:
    """`(B or 1, columns)` int: the ranks, each counted from the start of the column's own text."""
    return remembered(mask, "places", _found_places, of_columns=True)


def _found_places(mask: Columns) -> torch.Tensor:
    ranks = order(mask)
    if mask.sequence is not None:  # all columns of a packed row are real
        return ranks - torch.searchsorted(mask.sequence, mask.sequence)[None]
    begins = starts(mask)
    return ranks if begins is None else ranks - torch.where(begins, ranks - 1, 0).cummax(-1).values


def starts(mask: Columns) -> torch.Tensor | None:
    """`(B or 1, columns)` bool: which of the queries' own columns begin a text behind another; `None`: none does.

    In a dense mask that is where no query from there on sees a real key before it, and none before it one from there
    on.
    """
    if mask.starts is not None or mask.sequence is not None:
        found: torch.Tensor | None = mask.starts
        return found if mask.sequence is None else F.pad(mask.sequence.diff() != 0, (1, 0))[None]
    if mask.pairs is None or mask.restarts is False or 1 in (mask.window, mask.queries) or not mask._knows_own:
        return None
    return remembered(mask, "starts", _found_starts, of_columns=True)


def _found_starts(mask: Columns) -> torch.Tensor:
    seen, text, column = seen_by(mask._pairs()).any(dim=1), real(mask), own(mask)
    batch, size = max(len(seen), len(text), len(column)), seen.shape[-1]
    seen, text, column = seen.expand(batch, -1, -1), text.expand(batch, -1), column.expand(batch, -1)
    is_text = text.gather(-1, column)
    counts = is_text[..., None] & seen & text[:, None]
    sees = counts.any(-1)
    bits = counts.to(torch.uint8)
    first = bits.argmax(-1).masked_fill(~sees, size)
    last = (size - 1 - bits.flip(-1).argmax(-1)).masked_fill(~sees, -1)
    later = first.flip(-1).cummin(-1).values.flip(-1)  # what rows from here on see first
    earlier = F.pad(last.cummax(-1).values[:, :-1], (1, 0), value=-1)  # and those before here last
    begins = is_text & (later >= column) & (earlier < column) & (text.long().cumsum(-1).gather(-1, column) > 1)
    if isinstance(mask.restarts, torch.Tensor):
        begins = begins & mask.restarts.to(begins.device)
    return torch.zeros_like(text).scatter(-1, column, begins)


def real_keys(mask: Columns) -> torch.Tensor:
    """`(B or 1, 1 or Hkv, Tk)` bool: which keys are text, as far as is known; without the extra ones."""
    if mask.index is None:
        return real(mask)[:, None]
    is_key = mask.index >= 0
    return is_key if mask._is_one_text else mask._of_keys(real(mask), mask.index) & is_key


def key_order(mask: Columns) -> torch.Tensor:
    """`(B or 1, 1 or Hkv, Tk)` rank of each key; 0 of empty slots and of extra keys."""
    if mask.index is None or not mask._is_one_text:
        return by_key(mask, order(mask))
    return behind_extra(mask, mask.index + 1)


def key_places(mask: Columns) -> torch.Tensor:
    """The same, counted from the start of each key's own text."""
    return key_order(mask) if mask._is_one_text else by_key(mask, places(mask))


def row_order(mask: Columns) -> torch.Tensor:
    """`(B or 1, Tq)` rank of each query's own key."""
    return own(mask) + 1 if mask._is_one_text else by_row(mask, order(mask))


def row_places(mask: Columns) -> torch.Tensor:
    """The same, counted from the start of its own text."""
    return row_order(mask) if mask._is_one_text else by_row(mask, places(mask))


def by_key(mask: Columns, columns: torch.Tensor) -> torch.Tensor:
    """`(B or 1, 1 or Hkv, Tk)` numbers by column `(B or 1, columns)` by key: 0 of empty slots and of extra keys."""
    index = mask.index
    found = columns[:, None] if index is None else mask._of_keys(columns, index).masked_fill(index < 0, 0)
    return behind_extra(mask, found)


def by_row(mask: Columns, columns: torch.Tensor) -> torch.Tensor:
    """`(B or 1, Tq)` of what is said by column, `(B or 1, columns)`: that of each query's own."""
    return taken(columns, own(mask))


def behind_extra(mask: Columns, of_keys: torch.Tensor, value: float = 0) -> torch.Tensor:
    """What is said by key `(..., Tk)`, with the extra keys in front."""
    return F.pad(of_keys, (mask.extra, 0), value=value) if mask.extra else of_keys


def taken(tensor: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """`(B or 1, K)` entries of `(B or 1, N)` at `(B or 1, K)`."""
    batch = max(len(tensor), len(places))
    return tensor.expand(batch, -1).gather(-1, places.expand(batch, -1).to(tensor.device))


def log_counts(counts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `Mask.log_counts`, of `Mask.counts`."""
    return counts.clamp(min=1).to(dtype).log()


def refuse_uncounted(mask: Columns, *, keys: bool = False) -> None:
    """NotImplementedError where ranks are asked for that nobody knows; or, of the keys, which are text."""
    if mask.unsure if keys else mask.uncounted:
        raise NotImplementedError(UNCOUNTED)


def remembered(
    mask: Columns, name: str, find: Callable[[Columns], torch.Tensor], *, of_columns: bool = False
) -> torch.Tensor:
    """What is found once of a mask, or of all masks over its columns."""
    memo: dict[str, Any] = mask._memo.setdefault("columns", {}) if of_columns else mask._memo
    if name not in memo:
        memo[name] = find(mask)
    kept: torch.Tensor = memo[name]
    return kept
