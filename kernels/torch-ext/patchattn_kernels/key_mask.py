"""Which keys a query sees, in the form that Triton's kernels take."""

from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .rows import AttentionRule

_Bounds = tuple[torch.Tensor, torch.Tensor]
# Of masks that live: what they were when their bounds were worked out, and those. All layers of a model share a mask.
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class KeyMask(NamedTuple):
    """What of a rule decides which keys are seen.

    Attributes:
        mask: `(B or 1, Tq or 1, Tk)` bool, or `None` if `causal` and `window` say all.
        first, last: `(B or 1, Tq or 1)` int32: a query sees no key before `first`, and none from `last` on; with a
            mask.
        causal: no key after the query's own is seen.
        offset: own key of the first query.
        window: only keys less than so far from the own one are seen; 0 without.
    """

    mask: torch.Tensor | None
    first: torch.Tensor | None
    last: torch.Tensor | None
    causal: bool
    offset: int
    window: int


def unsupported(rule: AttentionRule) -> str | None:
    """What of a rule Triton's kernels do not compute, in words."""
    if rule.softcap is not None:
        return "logits have a softcap"
    if rule.bias is not None:
        return "logits have a bias"
    if rule.sinks is not None:
        return "the softmax has sinks"
    if rule.mask is not None and rule.mask.dim() == 4 and (rule.mask.is_floating_point() or rule.mask.shape[1] > 1):
        return "the mask is added to the logits, or differs between heads"
    return None


def key_mask(rule: AttentionRule, queries: int, keys: int, device: torch.device) -> KeyMask:
    """The form that kernels take of a rule that is not `unsupported`; nothing waits for the device.

    A mask of tokens stays one row per sequence. Windows counted over padding, and packed sequences, become a whole
    mask of Tq x Tk bytes, which all heads share.

    Args:
        rule: scaling and visibility.
        queries: their number.
        keys: their number.
        device: where to.
    """
    offset = keys - queries if rule.offset is None else rule.offset
    mask = rule.mask
    if mask is not None and mask.dim() == 4:
        seen = mask[:, 0, :, :keys]
        return KeyMask(seen, *_bounds_of(mask, seen), causal=False, offset=offset, window=0)
    if rule.sequence is not None or (rule.window is not None and mask is not None):
        seen = rule.visible(slice(0, queries), (queries, keys), device)
        return KeyMask(seen, *_bounds(seen), causal=False, offset=offset, window=0)
    window = rule.window or 0
    if mask is None:
        return KeyMask(None, None, None, rule.causal, offset, window)
    seen = mask[:, None, :keys].bool()
    return KeyMask(seen, *_bounds_of(mask, seen), causal=rule.causal, offset=offset, window=window)


def strides_but_of_one(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides, zeros along axes of size 1: one row stands for all queries or sequences, and does not vary with keys."""
    return tuple(0 if size == 1 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _bounds_of(mask: torch.Tensor, seen: torch.Tensor) -> _Bounds:
    """`_bounds` of the keys that a mask shows, worked out once until it is written to, for all views that are alike.

    Graphs work them out themselves: what is written to a mask between two replays, nobody sees.
    """
    gpu = mask.is_cuda
    graph = torch.compiler.is_compiling() or (gpu and torch.cuda.is_current_stream_capturing())
    if graph or mask.is_inference() or type(mask) is not torch.Tensor:
        return _bounds(seen)
    root = mask if mask._base is None else mask._base
    layout = (mask.dtype, mask.shape, mask.stride(), mask.storage_offset(), seen.shape)
    state = (mask._version, layout, torch.cuda.current_stream(mask.device) if gpu else None)
    known: tuple[object, _Bounds] | None = _known.get(root)
    if known is None or known[0] != state:
        with torch.inference_mode(False):  # training may use them later
            known = _known[root] = (state, _bounds(seen))
    return known[1]


def _bounds(seen: torch.Tensor) -> _Bounds:
    """First key that is seen, and one past the last; 0 and 0 where none is."""
    bits = seen.to(torch.uint8)
    some = bits.amax(dim=-1).int()
    first = bits.argmax(dim=-1).int()
    last = (seen.shape[-1] - bits.flip(-1).argmax(dim=-1).int()) * some
    return first, last
