"""Numbers of tokens along their sequence: without padding, and of each packed sequence on its own."""

import torch
import torch.nn.functional as F

from . import ranks
from .mask import Mask


def row_numbers(mask: Mask) -> torch.Tensor:
    """`(B or 1, Tq)` number of each query's token, the first real one is 0; NotImplementedError as `Mask.row_order`."""
    return mask.row_places() - 1


def key_numbers(mask: Mask) -> torch.Tensor:
    """`(B or 1, Tk)` number of each key's token, -1 before the first real one and of extra keys.

    Raises:
        NotImplementedError: heads hold keys of different tokens; or as `Mask.key_order`.
    """
    places = mask.key_places()
    if places.shape[1] != 1:
        raise NotImplementedError("Heads hold keys of different tokens here, so that keys have no one number.")
    return places[:, 0] - 1


def refuse_other_tokens(mask: Mask, *, by: str, site: str) -> None:
    """NotImplementedError if heads hold keys of different tokens, for who mixes what heads attend to."""
    if mask.index is not None and mask.index.shape[1] > 1:
        raise NotImplementedError(
            f"{by} mixes heads key by key, and in {site} heads hold keys of different tokens: use it without the "
            "variant that chooses keys for each head."
        )


def last_rows(mask: Mask) -> torch.Tensor:
    """`(B or 1, Tq)` bool: the last token of each sequence among the queries."""
    real, starts = mask.real(), ranks.starts(mask)
    if starts is None:
        return real & ~F.pad(real[:, 1:], (0, 1))
    return real & ~F.pad(real[:, 1:] & ~ranks.taken(starts, ranks.own(mask))[:, 1:], (0, 1))
