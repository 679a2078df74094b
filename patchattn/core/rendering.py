"""A mask as others take it: a base implementation in its own format, the kernels as a rule."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from patchattn_kernels import SinkAndRecent
from patchattn_kernels.block_lists import check_counted

from . import keeping, ranks
from .columns import Columns


def rendered(mask: Columns) -> tuple[torch.Tensor | BlockMask | None, dict[str, Any]]:
    """As `Mask.rendered`."""
    if not mask.changed:
        if mask.form == "blocks" and isinstance(mask.given, torch.Tensor) and mask.given.shape[1] > 1:
            raise _refused("flex attention", "a tensor that differs between heads: it reads the first head's")
        return mask.given, {}
    if mask.form == "tokens":
        return _tokens(mask)
    if mask.form == "blocks":
        return _blocks(mask), {}
    if isinstance(mask.pairs, torch.Tensor) and mask.index is None and not mask.keeps and not mask.extra:
        return mask.pairs, {}  # other rows or heads
    if isinstance(mask.given, torch.Tensor):
        is_added = mask.given.is_floating_point()
    elif mask.form is None:
        raise _refused("this attention implementation", "a changed mask: nothing says in which format it takes one")
    else:
        is_added = mask.form == "added"
    if not is_added:
        return (None if sees_all(mask) else keeping.seen(mask)), {}
    dtype = mask.given.dtype if isinstance(mask.given, torch.Tensor) else mask.dtype
    seen, added = keeping.seen(mask), keeping.added(mask)
    values = torch.zeros((), dtype=dtype, device=seen.device) if added is None else added
    return torch.where(seen, values, torch.finfo(dtype).min), {}


def sees_all(mask: Columns) -> bool:
    """Whether a single row sees every key, as structure alone says: it then needs no mask."""
    if mask.queries != 1 or mask.pairs is not None or mask.real_columns is not None or mask.keeps or mask.has_empty:
        return False
    ends = not mask.causal or (isinstance(mask.own, int) and mask.own == mask.columns - mask.dropped - 1)
    return ends and mask.window is None and mask.sequence is None


def _tokens(mask: Columns) -> tuple[torch.Tensor | BlockMask | None, dict[str, Any]]:
    """Flash attention aligns causal rows to the last keys and drops the rows of hidden ones: a window, or one row."""
    if mask.index is None and not mask.keeps and not mask.extra and not isinstance(mask.own, torch.Tensor):
        return mask.given, {"sliding_window": mask.window}
    if mask.queries > 1:
        raise _refused("flash attention", f"a choice of keys for {mask.queries} rows in one call")
    seen = keeping.seen(mask)
    if seen.shape[1] > 1:
        raise _refused("flash attention", "other keys in some heads than in others")
    words: dict[str, Any] = {"sliding_window": None}
    if mask.sequence is not None:  # the mask says what of them is left
        words |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"))
    return (None if sees_all(mask) else seen[:, 0, 0].expand(mask.batch, -1)), words


def _blocks(mask: Columns) -> BlockMask:
    """Functions that read tensors of up to two dimensions: those of four compile for one shape alone."""
    if isinstance(mask.given, torch.Tensor) or isinstance(mask.pairs, torch.Tensor):
        raise _refused("flex attention", "other keys, or rows, than those of a mask that is a tensor")
    if mask.index is not None and mask.index.shape[1] > 1:
        raise _refused("flex attention", "other keys in some heads than in others")
    if isinstance(mask.own, torch.Tensor) and mask.own.dim() == 2:
        raise _refused("flex attention", "some rows of a call")
    conditions: list[Callable[..., torch.Tensor]] = []
    window = mask.window if mask.pairs is None else None
    order = own = place = None
    if window is not None or any(isinstance(keep, SinkAndRecent) for keep in mask.keeps):
        order, place = (
            _whole(by_key[:, 0], mask.batch, -1) for by_key in (ranks.key_order(mask), ranks.key_places(mask))
        )
        own = _whole(ranks.row_order(mask), mask.batch, -1)
    for keep in mask.keeps:
        if isinstance(keep, SinkAndRecent):
            check_counted(keep, uncounted=mask.uncounted)

            limits = _whole(keep.recent, mask.heads), _whole(keep.sinks, mask.heads)

            def near(b: Any, h: Any, i: Any, j: Any, limits: Any = limits, known: Any = (order, place, own)) -> Any:
                (recent, sinks), (order, place, own) = limits, known
                return ((own[b, i] - order[b, j]).abs() < recent[h]) | (place[b, j] <= sinks[h])

            conditions.append(near)
            continue
        whole = keeping.as_mask(keep, mask)
        if whole.shape[1] > 1 or whole.shape[2] > 1:
            raise _refused("flex attention", "a choice of keys that differs between rows or heads")
        of_keys = _whole(whole[:, 0, 0], mask.batch, -1)

        def among(b: Any, h: Any, i: Any, j: Any, of_keys: Any = of_keys) -> Any:
            return of_keys[b, j]

        conditions.append(among)
    real = None
    if mask.has_empty:
        real = _whole(ranks.behind_extra(mask, ranks.real_keys(mask), value=True)[:, 0], mask.batch, -1)
    column = None if mask.index is None else _whole((mask.index[:, 0] - mask.dropped).clamp(min=0), mask.batch, -1)
    inner, extra = (None if mask.pairs is None else mask.pairs.mask_mod), mask.extra

    def shown(b: Any, h: Any, i: Any, j: Any) -> Any:
        place = (j - extra).clamp(min=0) if extra else j
        place = place if column is None else column[b, place]
        seen = torch.ones_like(j, dtype=torch.bool) if inner is None else inner(b, h, i, place)
        if real is not None:
            seen = seen & real[b, j]
        if window is not None and order is not None and own is not None:
            seen = seen & ((own[b, i] - order[b, j]).abs() < window)
        if extra:
            seen = seen | (j < extra)
        for condition in conditions:
            seen = seen & condition(b, h, i, j)
        return seen

    per_head = any(isinstance(keep, SinkAndRecent) and len(keep.sinks) > 1 for keep in mask.keeps) or (
        mask.pairs is not None and mask.pairs.shape[1] != 1
    )
    sizes = (mask.batch, mask.heads if per_head else None, mask.queries, mask.keys)
    return create_block_mask(shown, *sizes, device=str(mask.device))


def _whole(tensor: torch.Tensor, *sizes: int) -> torch.Tensor:
    """Expanded in memory: flex attention's code for a CPU does not compile with tensors that stride by 0."""
    return tensor.expand(*sizes).contiguous()


def structure(mask: Columns) -> dict[str, Any]:
    """Fields of an `AttentionRule`: structure where it lasts, else a dense mask and ranks; found once for all layers
    that share the mask."""
    found: dict[str, Any] | None = mask._memo.get("structure")
    if found is None:
        found = mask._memo["structure"] = _structure(mask)
    return found


def _structure(mask: Columns) -> dict[str, Any]:
    mask._check()
    if mask.index is not None or mask.keeps or mask.extra:
        return _gathered(mask)
    own = mask.own
    if mask.pairs is None:
        found: dict[str, Any] = {"mask": mask.real_columns, "causal": mask.causal, "window": mask.window}
        found["sequence"] = mask.sequence
        if isinstance(own, torch.Tensor) and own.dim() == 2:  # some rows
            whole = mask.real_columns is None and not mask.causal and mask.window is None and mask.sequence is None
            return {} if whole and mask.is_cross else _gathered(mask)
    else:
        pairs = mask._pairs()
        found = {"mask": pairs}
    told = own is None or isinstance(own, int)
    if told:
        found["offset"] = own
    # One row ends at the last real key, and without a window the keys that it sees are all real ones.
    by_mask = told and (own is not None or mask.queries == 1 or not mask._knows_own)
    hides = mask.pairs is not None and (mask._window_hides or (mask._has_past and ranks.is_known(mask.text)))
    if mask.dropped or not by_mask or hides:
        found |= _ranks(mask)
    elif mask.pairs is not None and ranks.starts(mask) is not None:
        found["place"] = ranks.key_places(mask)
    return {**found, "uncounted": mask.uncounted}


def _ranks(mask: Columns) -> dict[str, Any]:
    """Of keys and of the queries' own, among all there ever were, those that were dropped included."""
    found = {"order": ranks.key_order(mask), "own": ranks.row_order(mask)}
    return found if ranks.starts(mask) is None else {**found, "place": ranks.key_places(mask)}


def _gathered(mask: Columns) -> dict[str, Any]:
    seen, added = keeping.seen(mask), keeping.added(mask)
    if added is not None:
        seen = torch.where(seen, added, torch.finfo(added.dtype).min)
    elif mask.queries == 1 and seen.shape[1] == 1:  # by key alone, which kernels read faster
        seen = seen[:, 0, 0]
    known = {}
    if mask._knows_own:
        known = _ranks(mask)
        known |= {name: keeping.of_query_heads(known[name], mask.heads) for name in known.keys() - {"own"}}
    return {"mask": seen, **known, "uncounted": mask.uncounted}


def _refused(base: str, what: str) -> NotImplementedError:
    return NotImplementedError(
        f"{base.capitalize()} cannot be told {what}. Load the model with attn_implementation='sdpa' or 'eager'."
    )
