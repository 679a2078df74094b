"""What an attention mask says, in whatever format the base implementation wants it."""

from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_mask


def is_flash(base: str) -> bool:
    """Whether a base implementation is flash attention or a Hub kernel: 2D masks, aligned to the last key."""
    return "flash" in base or "/" in base


def visible_keys(
    mask: Any, *, q_length: int, kv_length: int, is_causal: bool, base: str, window: int | None, device: torch.device
) -> torch.Tensor:
    """Number of keys that each query sees.

    Args:
        mask: as the attention function gets it: `None`, bool or additive float `(B, H or 1, Tq, Tk)`, bool or integer
            `(B, Tk)` (flash attention), or a BlockMask.
        q_length, kv_length: rows and keys of the call, in tokens.
        is_causal: whether a query sees no later key; only read where the mask does not say it.
        base: the base implementation, which gives a missing mask its meaning.
        window: sliding window of flash attention, in tokens; the other implementations have it in the mask.
        device: where to make the result, if not from the mask.

    Returns:
        `(B or 1, Tq)` integers. A padded row may see none.
    """
    if isinstance(mask, BlockMask):
        batch, dense = mask.shape[0], mask.mask_mod
        visible = create_mask(dense, batch, 1, q_length, kv_length, device=str(device))
        return visible[:, 0].sum(-1)
    if isinstance(mask, torch.Tensor) and mask.dim() == 4:
        mask = mask[:, 0, :, :kv_length]
        visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return visible.sum(-1).expand(-1, q_length)
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        real = mask[:, -kv_length:].long()
        counts = real.cumsum(-1)[:, -q_length:] if is_causal else real.sum(-1, keepdim=True).expand(-1, q_length)
        return counts if window is None else counts.clamp(max=window)
    if mask is not None:
        raise NotImplementedError(f"Masks of type {type(mask).__name__} and shape {getattr(mask, 'shape', None)}.")
    if is_flash(base):  # lower-right alignment: the last query sees every key
        rows = torch.arange(kv_length - q_length + 1, kv_length + 1, device=device)
        counts = rows if is_causal else torch.full((q_length,), kv_length, device=device)
        return (counts if window is None else counts.clamp(max=window))[None]
    if base == "sdpa" and is_causal and q_length > 1:  # upper-left alignment, used only from an empty cache
        return torch.arange(1, q_length + 1, device=device)[None]
    return torch.full((1, q_length), kv_length, device=device)
