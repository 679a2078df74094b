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
    visible = _rows(mask, q_length, kv_length, device)
    if visible is not None:
        return visible.sum(-1)
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


def real_tokens(mask: Any, *, q_length: int, kv_length: int, is_cross: bool, device: torch.device) -> torch.Tensor:
    """`(B or 1, Tq)` bool: which query tokens are text rather than padding.

    Without a kv cache a token is padding if it does not see itself. With one, or in cross attention, the mask does not
    say which key is the token's own; then it is padding if it sees nothing, as on the left of a padded prompt.

    Args:
        mask: as `visible_keys` takes it.
        q_length, kv_length: rows and keys of the call, in tokens.
        is_cross: keys are those of another sequence.
        device: where to make the result, if not from the mask.
    """
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and not is_cross:
        return mask[:, -q_length:].bool()
    visible = _rows(mask, q_length, kv_length, device)
    if visible is None:
        return torch.ones(1, q_length, dtype=torch.bool, device=device)
    return visible.any(-1) if is_cross or q_length != kv_length else visible.diagonal(dim1=-2, dim2=-1)


def _rows(mask: Any, q_length: int, kv_length: int, device: torch.device) -> torch.Tensor | None:
    """`(B, Tq, Tk)` bool: what a dense mask or a BlockMask lets each query see; `None` for any other kind."""
    if isinstance(mask, BlockMask):
        return create_mask(mask.mask_mod, mask.shape[0], 1, q_length, kv_length, device=str(device))[:, 0]
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        return None
    mask = mask[:, 0, :, :kv_length]
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return visible.expand(-1, q_length, -1)
