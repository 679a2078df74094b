"""In which format a base implementation takes its mask, and what it does without one."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    eager_mask,
    flash_attention_mask,
    flex_attention_mask,
    sdpa_mask,
)

from ...core.given import Meaning, read_mask
from ...core.mask import Form, Mask
from ...core.ranks import NOTHING_TOLD, Told
from ...core.run import run_of
from .paged import PAGED, places_of_texts
from .sites import INLINE

# What an implementation takes, and what it computes without one, by the function that makes its masks.
_KINDS: dict[Any, tuple[Form, Meaning]] = {
    sdpa_mask: ("bool", "causal"),
    eager_mask: ("added", "all"),
    flex_attention_mask: ("blocks", "all"),
    flash_attention_mask: ("tokens", "flash"),
}


# Of one forward: layers of two kinds, the calls of attention and what enters their caches.
_MASKS_AT_ONCE = 4


def mask_of_call(
    given: Any,
    base: str,
    arguments: Mapping[str, Any],
    *,
    is_causal: bool,
    is_cross: bool,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    own: int | torch.Tensor | None = None,
    dropped: int | None = 0,
    told: Told = NOTHING_TOLD,
) -> Mask:
    """The mask of a call of a base implementation. Layers of one forward that are called alike share it.

    What it follows from is spelled out, as one that was read already is found by it in every layer.

    Args:
        given: as the attention function gets it.
        base: the base implementation.
        arguments: what the attention module, or its attention function, was called with.
        is_causal: by the call's argument, else the module's attribute.
        is_cross: as of `read_mask`, like all others.
        batch: likewise.
        heads: likewise.
        queries: likewise.
        keys: likewise.
        device: likewise.
        dtype: likewise.
        window: likewise.
        own: likewise.
        dropped: likewise.
        told: likewise.
    """
    run = run_of(arguments)
    version = _version(given, base, queries) if run.told and base != INLINE else None
    numbers = (is_causal, is_cross, batch, heads, queries, keys, device, dtype, window, own, dropped)
    if version is None or isinstance(own, torch.Tensor):
        return _read(given, base, arguments, told, *numbers)
    key = (id(given), version, base, id(told), torch.is_inference_mode_enabled(), numbers)
    found: tuple[Any, Told, Mask] | None = run.masks.get(key)
    if found is None:
        if len(run.masks) == _MASKS_AT_ONCE:  # layers on several devices get copies of their own
            del run.masks[next(iter(run.masks))]
        # What was given and told lives on beside the mask, so that no other object gets its identity.
        found = run.masks[key] = given, told, _read(given, base, arguments, told, *numbers)
    return found[2]


def _version(given: Any, base: str, queries: int) -> int | None:
    """How often a mask was changed that follows from what it is found by: tensors, by identity and version, and
    numbers; `None` of one that does not."""
    if torch.compiler.is_compiling():
        return None
    if given is None:  # flash attention may be told of packed sequences by tensors beside it
        return 0 if queries == 1 or not is_flash(base) else None
    is_counted = isinstance(given, torch.Tensor) and not given.is_inference()  # such a one does not count its changes
    return given._version if is_counted else None


_NUMBERS = ("is_causal", "is_cross", "batch", "heads", "queries", "keys", "device", "dtype", "window", "own", "dropped")


def _read(given: Any, base: str, arguments: Mapping[str, Any], told: Told, *numbers: Any) -> Mask:
    form, _ = _KINDS.get(_mask_function(base), (None, None))
    sizes = dict(zip(_NUMBERS, numbers, strict=True))
    is_causal, sequence = sizes.pop("is_causal") and not sizes["is_cross"], None
    meaning: Meaning | str = "all"
    if given is None:
        meaning = no_mask_means(base, is_causal=is_causal, q_length=sizes["queries"])
        try:
            sequence = packed_sequences(given, base, arguments, sizes["batch"], sizes["queries"])
        except NotImplementedError as error:
            meaning = str(error)
    if PAGED in arguments:
        sizes |= places_of_texts(arguments, sizes["queries"], sizes["keys"])
    return read_mask(given, form=form, meaning=meaning, is_causal=is_causal, sequence=sequence, told=told, **sizes)


def no_mask_means(base: str, *, is_causal: bool, q_length: int) -> Meaning | str:
    """What queries see where a base implementation is given no mask.

    `causal`, as SDPA: no later key, aligned to the first key. `all`: every key. `flash`: no later key in a causal
    module, aligned to the last key, in windows and in packed sequences. An implementation of one's own says which by
    the mask function that is registered under its name: what `sdpa_mask` makes masks for must take their absence as
    SDPA does.

    Args:
        base: the base implementation.
        is_causal: whether the module is causal.
        q_length: rows of the call; SDPA shows all keys to a single one.

    Returns:
        Which; or, in a sentence, that nothing says whether the implementation is causal.
    """
    _, meaning = _KINDS.get(_mask_function(base), (None, None))
    if meaning == "flash":
        return "flash"
    if not is_causal or q_length == 1 or meaning == "all":
        return "all"
    if meaning is None:
        return (
            f"The attention implementation {base!r} was given no mask, and nothing says whether it then hides later "
            f"keys: {'one of its own' if base in ALL_MASK_ATTENTION_FUNCTIONS else 'no'} mask function is registered "
            "under that name. Register the one whose masks it takes, then patch again; for one that reads is_causal "
            f"as SDPA does, AttentionMaskInterface.register({base!r}, transformers.masking_utils.sdpa_mask)."
        )
    return "causal"


def _mask_function(base: str) -> Any:
    if base == INLINE:
        return sdpa_mask  # what a module calls itself, or a sum of numbers, which every kind of mask may be
    function = ALL_MASK_ATTENTION_FUNCTIONS.get(base.removeprefix("paged|"))  # continuous batching's eager attention
    return flash_attention_mask if function is None and is_flash(base) else function


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
    if mask is not None or _mask_function(base) is not flash_attention_mask:
        return None
    ends, positions = arguments.get("cu_seq_lens_q"), arguments.get("position_ids")
    if ends is not None:
        if batch != 1:
            raise NotImplementedError(f"Packed sequences (cu_seq_lens_q) are supported in one row, got {batch}.")
        return torch.searchsorted(ends[1:], torch.arange(length, device=ends.device, dtype=ends.dtype), right=True)
    if positions is None or batch != 1 or length == 1 or positions.shape != (1, length):
        return None
    return (positions[0] == positions.min()).cumsum(-1)
