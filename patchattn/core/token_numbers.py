"""Numbers of tokens along their sequence: without padding, and of each packed sequence on its own."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from .mask import Mask


def row_numbers(mask: Mask) -> torch.Tensor:
    """`(B or 1, Tq)` number of each query's token, the first real one is 0; NotImplementedError as `Mask.row_order`."""
    return _from_zero(mask.row_order(), _starts(mask))


def key_numbers(mask: Mask) -> torch.Tensor:
    """`(B or 1, Tk)` number of each key's token, -1 before the first real one and of extra keys.

    Raises:
        NotImplementedError: heads hold keys of different tokens.
    """
    order = mask.key_order()
    if order.shape[1] != 1:
        raise NotImplementedError("Heads hold keys of different tokens here, so that keys have no one number.")
    starts = _starts(mask) if mask.queries == mask.keys else torch.zeros_like(order[:, 0], dtype=torch.bool)
    return _from_zero(order[:, 0], starts)


def last_rows(mask: Mask) -> torch.Tensor:
    """`(B or 1, Tq)` bool: the last token of each sequence among the queries."""
    real = mask.real()
    return real & ~F.pad(real[:, 1:] & ~_starts(mask)[:, 1:], (0, 1))


def _from_zero(order: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Numbers from ranks `(B or 1, T)` among all real tokens."""
    return order - 1 - torch.where(starts, order - 1, 0).cummax(-1).values


def _starts(mask: Mask) -> torch.Tensor:
    """`(B or 1, Tq)` bool: which tokens begin a packed sequence behind another, as they do not see the one before."""
    if mask.queries != mask.columns or (mask.pairs is None and mask.sequence is None):
        return torch.zeros(1, mask.queries, dtype=torch.bool, device=mask.device)  # packing comes without a cache
    if mask.sequence is not None:
        return F.pad(mask.sequence.diff() != 0, (1, 0))[None]
    plain = replace(mask, keeps=(), index=None, keys=mask.columns, extra=0)
    sees_previous = plain.seen().any(dim=1).diagonal(offset=-1, dim1=-2, dim2=-1)
    real = plain.real_keys()[:, 0]
    return F.pad(~sees_previous & real[:, 1:] & real[:, :-1], (1, 0))
