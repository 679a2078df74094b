"""What an attention mask says, in whatever format the base implementation wants it."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    eager_mask,
    flash_attention_mask,
    flex_attention_mask,
    sdpa_mask,
)

from patchattn_kernels.rows import seen_by

Meaning = Literal["causal", "all", "flash"]
# What an implementation computes without a mask, by the function that makes its masks.
_MEANINGS: dict[Any, Meaning] = {
    sdpa_mask: "causal",
    eager_mask: "all",
    flex_attention_mask: "all",
    flash_attention_mask: "flash",
}


def no_mask_means(base: str, *, is_causal: bool, q_length: int) -> Meaning:
    """What queries see where a base implementation is given no mask.

    `causal`, as SDPA: no later key, aligned to the first key. `all`: every key. `flash`: no later key in a causal
    module, aligned to the last key, in windows and in packed sequences. An implementation of one's own says which by
    the mask function that is registered under its name: what `sdpa_mask` makes masks for must take their absence as
    SDPA does.

    Args:
        base: the base implementation.
        is_causal: whether the module is causal.
        q_length: rows of the call; SDPA shows all keys to a single one.

    Raises:
        NotImplementedError: nothing says whether the implementation is causal.
    """
    meaning = _registered_meaning(base)
    if meaning == "flash":
        return "flash"
    if not is_causal or q_length == 1 or meaning == "all":
        return "all"
    if meaning is None:
        raise NotImplementedError(
            f"The attention implementation {base!r} was given no mask, and nothing says whether it then hides later "
            f"keys: {'one of its own' if base in ALL_MASK_ATTENTION_FUNCTIONS else 'no'} mask function is registered "
            "under that name. Register the one whose masks it takes, then patch again; for one that reads is_causal "
            f"as SDPA does, AttentionMaskInterface.register({base!r}, transformers.masking_utils.sdpa_mask)."
        )
    return "causal"


def _registered_meaning(base: str) -> Meaning | None:
    function = ALL_MASK_ATTENTION_FUNCTIONS.get(base)
    return "flash" if function is None and is_flash(base) else _MEANINGS.get(function)


def is_flash(base: str) -> bool:
    """Whether a base implementation is flash attention or a Hub kernel, by its name, as transformers tells it."""
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
    if mask is not None or _registered_meaning(base) != "flash":
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
        `(B or 1, Tq)` integers; `(B or 1, Tq, H)` of a mask that has more than one head. A padded row may see none.

    Raises:
        NotImplementedError: a mask of another kind, or `no_mask_means` cannot tell.
    """
    visible = _rows(mask, q_length, kv_length, device)
    if visible is not None:
        return visible.sum(-1).transpose(1, 2).squeeze(-1)
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        order = mask[:, -kv_length:].long().cumsum(-1)
        return _flash_counts(order[:, -q_length:], order[:, -1:], is_causal, window)
    if mask is not None:
        raise _unknown(mask)
    if sequence is not None and q_length == kv_length:
        first, end = (torch.searchsorted(sequence, sequence, right=right) for right in (False, True))
        order = torch.arange(1, kv_length + 1, device=first.device) - first
        return _flash_counts(order[None], (end - first)[None], is_causal, window)
    meaning = no_mask_means(base, is_causal=is_causal, q_length=q_length)
    if meaning == "flash":
        order = torch.arange(kv_length - q_length + 1, kv_length + 1, device=device)[None]
        return _flash_counts(order, order[:, -1:], is_causal, window)
    if meaning == "causal":  # from an empty cache only
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

    `(B or 1, H, Tq, Tk)` of a mask that has more than one head; `of_head` takes one of them. Takes what `visible_keys`
    takes, whose result is the sum of this one's rows.
    """
    visible = _rows(mask, q_length, kv_length, device)
    if visible is not None:
        return visible.squeeze(1)
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        real = mask[:, -kv_length:].bool()
    elif mask is None:
        real = torch.ones(1, kv_length, dtype=torch.bool, device=device)
    else:
        raise _unknown(mask)
    meaning = "flash" if mask is not None else no_mask_means(base, is_causal=is_causal, q_length=q_length)
    if meaning == "all":
        return real[:, None].expand(-1, q_length, -1)
    keys = torch.arange(kv_length, device=real.device)
    rows = keys[kv_length - q_length :] if meaning == "flash" else keys[:q_length]
    visible = real[:, None].expand(-1, q_length, -1)
    if sequence is not None and q_length == kv_length:
        visible = visible & (sequence[:, None] == sequence)
    if is_causal:
        visible = visible & (keys <= rows[:, None])
    if window is not None:  # counted in real tokens: flash attention takes padding out
        order = real.cumsum(-1)
        visible = visible & ((order[:, rows, None] - order[:, None]).abs() < window)
    return visible


def of_head(visible: torch.Tensor, head: int) -> torch.Tensor:
    """`(B or 1, Tq, Tk)` of what `visibility` gives, for one query head."""
    return visible if visible.dim() == 3 else visible[:, head]


def of_all_heads(visible: torch.Tensor) -> torch.Tensor:
    """`(B or 1, Tq, Tk)` of what `visibility` gives, for statistics that count alike in all heads.

    Raises:
        NotImplementedError: heads differ in what they see.
    """
    if visible.dim() == 4 and not bool((visible == visible[:, :1]).all()):
        raise NotImplementedError(
            "The attention mask shows different keys to different heads: such masks per head are not supported here."
        )
    return of_head(visible, 0)


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

    A token is padding if it does not see itself, in any head. In cross attention, and with a kv cache unless `own` is
    given, it is not known which key is its own; then it is padding if it sees nothing, as on the left of a padded
    prompt.

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
    visible = visible.any(dim=1)
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
    """`(B, H or 1, Tq, Tk)` bool: what a dense mask or a BlockMask lets each query see; `None` for any other kind."""
    if isinstance(mask, BlockMask):
        return create_mask(mask.mask_mod, mask.shape[0], mask.shape[1], q_length, kv_length, device=str(device))
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        return None
    return seen_by(mask[..., :kv_length]).expand(-1, -1, q_length, -1)
