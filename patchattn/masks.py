"""What an attention mask says, in whatever format the base implementation wants it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_mask


def is_flash(base: str) -> bool:
    """Whether a base implementation is flash attention or a Hub kernel: 2D masks, aligned to the last key."""
    return "flash" in base or "/" in base


def packed_sequences(
    mask: Any, base: str, arguments: Mapping[str, Any], batch: int, length: int
) -> torch.Tensor | None:
    """`(T,)` number of the sequence that each token is of, where flash attention gets several in one row.

    It tells them apart as transformers does: by `cu_seq_lens_q`, else by position ids that start anew. The other
    implementations have packing in the mask.

    Args:
        mask: as the attention function gets it.
        base: the base implementation.
        arguments: what the attention module, or its attention function, was called with.
        batch: rows of the call.
        length: number of queries of a row.

    Raises:
        NotImplementedError: packed sequences in more than one row.
    """
    if mask is not None or not is_flash(base):
        return None
    ends, positions = arguments.get("cu_seq_lens_q"), arguments.get("position_ids")
    if ends is not None:
        if batch != 1:
            raise NotImplementedError(f"Packed sequences (cu_seq_lens_q) are supported in one row, got {batch}.")
        return torch.searchsorted(ends[1:], torch.arange(length, device=ends.device, dtype=ends.dtype), right=True)
    if positions is None or batch != 1 or length == 1 or positions.shape != (1, length):
        return None
    return (positions[0] == positions.min()).cumsum(-1)


def visible_keys(
    mask: Any,
    *,
    q_length: int,
    kv_length: int,
    is_causal: bool,
    base: str,
    window: int | None,
    device: torch.device,
    sequence: torch.Tensor | None = None,
) -> torch.Tensor:
    """Number of keys that each query sees.

    Args:
        mask: as the attention function gets it: `None`, bool or additive float `(B, H or 1, Tq, Tk)`, bool or integer
            `(B, Tk)` (flash attention), or a BlockMask.
        q_length: rows of the call, in tokens.
        kv_length: keys of the call, in tokens.
        is_causal: whether a query sees no later key; only read where the mask does not say it.
        base: the base implementation, which gives a missing mask its meaning.
        window: sliding window of flash attention, in tokens; the other implementations have it in the mask.
        device: where to make the result, if not from the mask.
        sequence: `(Tk,)` of `packed_sequences`; queries are then those tokens too.

    Returns:
        `(B or 1, Tq)` integers. A padded row may see none.
    """
    visible = _rows(mask, q_length, kv_length, device)
    if visible is not None:
        return visible.sum(-1)
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        order = mask[:, -kv_length:].long().cumsum(-1)
        return _flash_counts(order[:, -q_length:], order[:, -1:], is_causal, window)
    if mask is not None:
        raise _unknown(mask)
    if sequence is not None and q_length == kv_length:
        first, end = (torch.searchsorted(sequence, sequence, right=right) for right in (False, True))
        order = torch.arange(1, kv_length + 1, device=first.device) - first
        return _flash_counts(order[None], (end - first)[None], is_causal, window)
    if is_flash(base):  # lower-right alignment: the last query sees every key
        order = torch.arange(kv_length - q_length + 1, kv_length + 1, device=device)[None]
        return _flash_counts(order, order[:, -1:], is_causal, window)
    if base == "sdpa" and is_causal and q_length > 1:  # upper-left alignment, used only from an empty cache
        return torch.arange(1, q_length + 1, device=device)[None]
    return torch.full((1, q_length), kv_length, device=device)


def visibility(
    mask: Any,
    *,
    q_length: int,
    kv_length: int,
    is_causal: bool,
    base: str,
    window: int | None,
    device: torch.device,
    sequence: torch.Tensor | None = None,
) -> torch.Tensor:
    """`(B or 1, Tq, Tk)` bool: which keys each query sees. For statistics: it is as large as one head's attention.

    Takes what `visible_keys` takes, whose result is the sum of this one's rows.
    """
    visible = _rows(mask, q_length, kv_length, device)
    if visible is not None:
        return visible
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        real = mask[:, -kv_length:].bool()
    elif mask is None:
        real = torch.ones(1, kv_length, dtype=torch.bool, device=device)
    else:
        raise _unknown(mask)
    aligned = mask is not None or is_flash(base)  # to the last key
    if not aligned and not (base == "sdpa" and is_causal and q_length > 1):
        return real[:, None].expand(-1, q_length, -1)
    keys = torch.arange(kv_length, device=real.device)
    rows = keys[kv_length - q_length :] if aligned else keys[:q_length]
    visible = real[:, None].expand(-1, q_length, -1)
    if sequence is not None and q_length == kv_length:
        visible = visible & (sequence[:, None] == sequence)
    if is_causal:
        visible = visible & (keys <= rows[:, None])
    if window is not None:  # counted in real tokens: flash attention takes padding out
        order = real.cumsum(-1)
        visible = visible & ((order[:, rows, None] - order[:, None]).abs() < window)
    return visible


def real_tokens(
    mask: Any,
    *,
    q_length: int,
    kv_length: int,
    is_cross: bool,
    device: torch.device,
    own: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """`(B or 1, Tq)` bool: which query tokens are text rather than padding.

    A token is padding if it does not see itself. In cross attention, and with a kv cache unless `own` is given, it is
    not known which key is its own; then it is padding if it sees nothing, as on the left of a padded prompt.

    Args:
        mask: as `visible_keys` takes it.
        q_length: rows of the call, in tokens.
        kv_length: keys of the call, in tokens.
        is_cross: keys are those of another sequence.
        device: where to make the result, if not from the mask.
        own: index of the key that belongs to the first query, where a kv cache says it.
    """
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and not is_cross:
        return mask[:, -q_length:].bool()
    visible = _rows(mask, q_length, kv_length, device)
    if visible is None:
        return torch.ones(1, q_length, dtype=torch.bool, device=device)
    if is_cross or (own is None and q_length != kv_length):
        return visible.any(-1)
    keys = torch.arange(q_length, device=visible.device) + (0 if own is None else own)
    return visible.gather(-1, keys.view(1, -1, 1).expand(visible.shape[0], -1, 1)).squeeze(-1)


def _flash_counts(order: torch.Tensor, total: torch.Tensor, is_causal: bool, window: int | None) -> torch.Tensor:
    """Visible keys of queries by their order `(B, Tq)` among `total` `(B, 1)` real tokens, both counted from 1.

    A window holds that many tokens up to the query, itself included, and without causality as many on its other side.
    """
    last = order if is_causal else total.expand_as(order)
    if window is None:
        return last
    return torch.minimum(last, order + window - 1) - (order - window).clamp(min=0)


def _unknown(mask: Any) -> NotImplementedError:
    return NotImplementedError(f"Masks of type {type(mask).__name__} and shape {getattr(mask, 'shape', None)}.")


def key_length(mask: Any, otherwise: int) -> int:
    """Number of keys that a mask is about, where it says so."""
    if isinstance(mask, BlockMask):
        return int(mask.seq_lengths[1])
    return mask.shape[-1] if isinstance(mask, torch.Tensor) and mask.dim() == 4 else otherwise


def _rows(mask: Any, q_length: int, kv_length: int, device: torch.device) -> torch.Tensor | None:
    """`(B, Tq, Tk)` bool: what a dense mask or a BlockMask lets each query see; `None` for any other kind."""
    if isinstance(mask, BlockMask):
        return create_mask(mask.mask_mod, mask.shape[0], 1, q_length, kv_length, device=str(device))[:, 0]
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        return None
    mask = mask[:, 0, :, :kv_length]
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return visible.expand(-1, q_length, -1)
