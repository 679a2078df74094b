"""A mask read off what a model passed to its attention function."""

from typing import Any, Literal

import torch
from torch.nn.attention.flex_attention import BlockMask

from . import ranks
from .mask import Form, Mask

# Without a mask: no later key, aligned to the first key; every key; as flash attention.
Meaning = Literal["causal", "all", "flash"]


def read_mask(
    given: Any,
    *,
    form: Form | None,
    meaning: Meaning | str,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    is_causal: bool = True,
    is_cross: bool = False,
    window: int | None = None,
    sequence: torch.Tensor | None = None,
    own: int | torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    dropped: int | None = 0,
    told: ranks.Told = ranks.NOTHING_TOLD,
) -> Mask:
    """The mask of a call.

    Args:
        given: as the attention function gets it: `None`, bool or added `(B or 1, H or 1, Tq or 1, Tk)`, tokens
            `(B, Tk)` (flash attention), or a BlockMask.
        form: what the base implementation takes; `None`: not known.
        meaning: what the base implementation does without a mask; or, in a sentence, why that is not known.
        batch: B.
        heads: query heads.
        queries: Tq.
        keys: Tk.
        device: of the call.
        dtype: of the queries.
        is_causal: whether a query sees no later key; read only where the mask does not say it.
        is_cross: whether keys are of another sequence.
        window: sliding window of the module, in tokens. Flash attention applies it; in other masks it is contained.
        sequence: `(Tk,)` number of the packed sequence each token is of (flash attention).
        own: place of the first query's own key, where a kv cache tells it; of every query's `(1, Tq)`.
        starts: `(1, Tk)` bool: which keys begin a text, where the call holds several and says so.
        dropped: keys that the cache has let go of before the first one; `None`: not known.
        told: what the model was told of its tokens.
    """
    if own is None and not is_cross and queries == keys:
        own = 0
    said: dict[str, Any] = {"causal": is_causal and not is_cross, "window": window, "own": own, "starts": starts}
    last = None if is_cross else keys - queries  # where the last query's own key is the last one
    if given is None and meaning == "flash":
        said |= {"own": last, "sequence": sequence if queries == keys else None}
    elif given is None and meaning == "causal":  # from an empty cache only
        said |= {"causal": True, "window": None, "own": 0}
    elif given is None and meaning == "all":
        said |= {"causal": False, "window": None, "own": last if own is None else own}
    elif given is None:
        said["fault"] = meaning
    elif isinstance(given, BlockMask):
        said["pairs"] = given
    elif isinstance(given, torch.Tensor) and given.dim() == 4 and given.shape[-1] >= keys:
        said["pairs"] = given[..., :keys].expand(-1, -1, queries, -1)
    elif isinstance(given, torch.Tensor) and given.dim() == 2:
        said |= {"real_columns": given[:, -keys:].bool(), "own": last}
    else:
        shape = getattr(given, "shape", None)
        said["fault"] = (
            f"Masks of type {type(given).__name__} and shape {shape} are not known, for {queries} queries and {keys} "
            "keys."
        )
    sizes = {"batch": batch, "dropped": dropped or 0, "queries": queries, "keys": keys}
    text, restarts = ranks.fitting(ranks.NOTHING_TOLD if is_cross else told, own=own, **sizes)
    is_known, pairs = ranks.is_known(text), said.get("pairs")
    # A cache that lets go of what no query sees keeps fewer keys than this.
    unsure = pairs is not None and window is not None and not is_known and not is_cross and keys - queries >= window
    return Mask(
        given=given,
        form=form,
        batch=batch,
        heads=heads,
        queries=queries,
        keys=keys,
        columns=keys + (dropped or 0),
        device=device,
        dtype=dtype,
        is_cross=is_cross,
        dropped=dropped or 0,
        text=text,
        restarts=restarts,
        unsure=unsure,
        uncounted=dropped is None or unsure or (dropped > 0 and not is_known),
        **said,
    )


def real_tokens(given: Any, *, queries: int, keys: int, device: torch.device, is_cross: bool = False) -> torch.Tensor:
    """`(B or 1, Tq)` bool: which queries a mask says are text rather than padding; see `Mask.real`."""
    sizes: dict[str, Any] = {"batch": 1, "heads": 1, "queries": queries, "keys": keys, "device": device}
    return read_mask(given, form=None, meaning="all", is_causal=False, is_cross=is_cross, **sizes).real()


def key_length(given: Any, otherwise: int) -> int:
    """Number of keys that a mask is about, where it says so."""
    if isinstance(given, BlockMask):
        return int(given.seq_lengths[1])
    return given.shape[-1] if isinstance(given, torch.Tensor) and given.dim() == 4 else otherwise
