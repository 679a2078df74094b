"""Which keys a query head attends to: sinks and recent keys, or lists of key blocks from a selector. Plain torch.

Shapes: B batch, H query heads, Tq queries, Tk keys, Qb = ceil(Tq / block_q), Kb = ceil(Tk / block_k).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .rows import AttentionRule, with_heads

UNBOUNDED = 2**30  # as a number of keys: all of them
UNCOUNTED = (
    "It is not known how many real keys came before those that these queries see: a sliding window hides them, or its "
    "kv cache has let go of them, and nobody told which of them were padding. A variant that counts keys from the "
    "first one, as sinks are, must say keeps_state; and the whole model must be given a mask of tokens (B, T), or "
    "none, and no masks that are made already, such as those of generate with a static cache."
)


class SinkAndRecent(NamedTuple):
    """Per query head, the first keys of a sequence and those just before the query; made by `sink_and_recent`.

    Attributes:
        sinks: `(H,)` int32 number of first keys that every query sees.
        recent: `(H,)` int32 number of last keys that a query sees, its own among them.
        most_sinks: the largest of `sinks`, known without asking the device.
        window: `recent`, where it is the same in all heads and there are no sinks, known without asking the device.
    """

    sinks: torch.Tensor
    recent: torch.Tensor
    most_sinks: int
    window: int | None = None


class BlockLists(NamedTuple):
    """For every query head and block of queries, the blocks of keys that are read; made by `lists_from_mask`.

    Attributes:
        indices: `(B or 1, H or 1, Qb, N)` int32 numbers of key blocks, ascending, none twice.
        counts: `(B or 1, H or 1, Qb)` int32 how many of the N entries count; the others are not read.
        block_q: queries per block.
        block_k: keys per block.
    """

    indices: torch.Tensor
    counts: torch.Tensor
    block_q: int
    block_k: int


def sink_and_recent(
    sinks: int | Sequence[int],
    recent: int | Sequence[int | None] | None,
    heads: int,
    device: torch.device | str | None = None,
) -> SinkAndRecent:
    """The sizes of every query head's window. Where they differ make it once, not in every call: it copies to the
    device.

    Args:
        sinks: number of first keys, for all heads or one per head; at least 0.
        recent: number of last keys, the query's own among them; at least 1; `None`: all keys.
        heads: number of query heads.
        device: where to.

    Raises:
        ValueError: a size is out of range, or there are not as many as heads.
    """
    first = [sinks] * heads if isinstance(sinks, int) else list(sinks)
    last = [recent] * heads if isinstance(recent, int) or recent is None else list(recent)
    if len(first) != heads or len(last) != heads:
        raise ValueError(f"Expected sinks and recent for {heads} heads, got {len(first)} and {len(last)}.")
    if min(first, default=0) < 0 or any(size is not None and size < 1 for size in last):
        raise ValueError(f"Expected sinks >= 0 and recent >= 1 (or None), got sinks={sinks} and recent={recent}.")
    bounded = [min(size, UNBOUNDED) for size in first]
    sizes = [min(size or UNBOUNDED, UNBOUNDED) for size in last]
    most = max(bounded, default=0)
    return SinkAndRecent(
        _on_device(bounded, device),
        _on_device(sizes, device),
        most,
        sizes[0] if most == 0 and len(set(sizes)) == 1 else None,
    )


def _on_device(sizes: list[int], device: torch.device | str | None) -> torch.Tensor:
    """int32; where all are alike nothing is copied."""
    if len(set(sizes)) == 1:
        return torch.full((len(sizes),), sizes[0], dtype=torch.int32, device=device)
    return torch.tensor(sizes, dtype=torch.int32, device=device)


def lists_from_mask(blocks: torch.Tensor, block_q: int, block_k: int, *, most: int | None = None) -> BlockLists:
    """Lists of the true entries, built on the device without waiting for it.

    Args:
        blocks: `(B or 1, H or 1, Qb, Kb)` bool: which key blocks a query block reads.
        block_q: queries per block.
        block_k: keys per block.
        most: true entries that no row has more of, where that is known; the lists are then that short.

    Raises:
        ValueError: wrong dtype, shape or block size.
    """
    if blocks.dtype != torch.bool or blocks.dim() != 4:
        raise ValueError(f"Expected a bool mask (B, H, Qb, Kb), got {blocks.dtype} {tuple(blocks.shape)}.")
    if min(block_q, block_k) < 1:
        raise ValueError(f"Expected blocks of at least 1, got block_q={block_q} and block_k={block_k}.")
    total = blocks.shape[-1]
    running = blocks.cumsum(dim=-1, dtype=torch.int32)
    number = torch.arange(1, (total if most is None else min(most, total)) + 1, dtype=torch.int32, device=blocks.device)
    number = number.expand(*blocks.shape[:-1], -1).contiguous()
    # the n-th true entry is where the running sum first reaches n
    indices = torch.searchsorted(running, number, out_int32=True)
    return BlockLists(indices, blocks.sum(dim=-1, dtype=torch.int32), block_q, block_k)


def mask_from_lists(lists: BlockLists, key_blocks: int) -> torch.Tensor:
    """`(B or 1, H or 1, Qb, Kb)` bool: the inverse of `lists_from_mask`."""
    width = lists.indices.shape[-1]
    counts = torch.arange(width, device=lists.indices.device) < lists.counts[..., None]
    mask = counts.new_zeros(*lists.counts.shape, key_blocks + 1)  # the last one takes what does not count
    return mask.scatter(-1, torch.where(counts, lists.indices.long(), key_blocks), True)[..., :-1]


def transposed(lists: BlockLists, key_blocks: int) -> BlockLists:
    """For every block of keys, the blocks of queries that read it: what the gradients of keys and values loop over."""
    return lists_from_mask(mask_from_lists(lists, key_blocks).mT.contiguous(), lists.block_k, lists.block_q)


def key_order(rule: AttentionRule, queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """`(B or 1, Tk)` int32: how many real keys there are up to each one, itself included.

    Keys that a 4-dim mask shows to no query of any head are not real.
    """
    mask = rule.mask
    if mask is None:
        return torch.arange(1, keys + 1, dtype=torch.int32, device=device)[None]
    if mask.dim() == 4:
        real = with_heads(rule.visible(slice(0, queries), (queries, keys), device)).flatten(1, 2).any(dim=1)
    else:
        real = mask[:, :keys].bool()
    return real.cumsum(dim=-1, dtype=torch.int32)


def check_counted(keep: SinkAndRecent, *, uncounted: bool) -> None:
    """NotImplementedError where first keys are asked for and it is not known which ones are."""
    if uncounted and keep.most_sinks:
        raise NotImplementedError(UNCOUNTED)


def ranks(rule: AttentionRule, queries: int, keys: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`(B or 1, H or 1, Tk)` and `(B or 1, Tq)`: real keys up to each key, and up to each query's own one."""
    if rule.order is not None and rule.own is not None:
        return rule.order, rule.own
    order = key_order(rule, queries, keys, device)
    return order[:, None], order[:, own_keys(rule, queries, keys, device)[0, 0]]


def sequence_order(rule: AttentionRule, order: torch.Tensor) -> torch.Tensor:
    """Ranks `(B or 1, H or 1, Tk)` counted from the start of each key's sequence on."""
    if rule.place is not None:
        return rule.place
    if rule.sequence is None:
        return order
    start = torch.searchsorted(rule.sequence, rule.sequence)  # sequences lie one after the other
    return order - F.pad(order, (1, 0))[..., start]


def own_keys(rule: AttentionRule, queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """`(B or 1, H or 1, Tq)` place of each query's own key, or of the next one where that is not among the keys."""
    if rule.offset is None and rule.order is not None and rule.own is not None:
        batch, heads = max(len(rule.order), len(rule.own)), rule.order.shape[1]
        own = rule.own[:, None].to(rule.order.dtype).expand(batch, heads, -1).contiguous()
        place = torch.searchsorted(rule.order.expand(batch, -1, -1).contiguous(), own)
    else:
        offset = keys - queries if rule.offset is None else rule.offset
        place = torch.arange(queries, device=device)[None, None] + offset
    return place.clamp(0, keys - 1)


def seen_blocks(
    rule: AttentionRule,
    *,
    queries: int,
    keys: int,
    block_q: int,
    block_k: int,
    device: torch.device,
    window: SinkAndRecent | None = None,
) -> torch.Tensor:
    """`(B or 1, H or 1, Qb, Kb)` bool: the key blocks of which some query of a block may see some key.

    Packed sequences are told apart for sinks alone.

    Args:
        rule: visibility.
        queries: their number.
        keys: their number.
        block_q: queries per block.
        block_k: keys per block.
        device: where to.
        window: sinks and recent keys of every head, which then bound the blocks too.
    """
    if queries == 0 or keys == 0:
        return torch.zeros(1, 1, -(-queries // block_q), -(-keys // block_k), dtype=torch.bool, device=device)
    order, own = ranks(rule, queries, keys, device)
    first, last, _, own_last = _ends(rule, queries, keys, block_q, block_k, device)
    rows = torch.arange(0, queries, block_q, device=device)
    low, high = own[:, rows, None], own[:, (rows + block_q).clamp(max=queries) - 1, None]

    def gap() -> torch.Tensor:
        """Real keys between the query block and the key block, (B or 1, H or 1, Qb, Kb)."""
        behind = low[:, None] - order[:, :, None, last]
        return torch.maximum(behind, order[:, :, None, first] - high[:, None])

    if rule.mask is not None and rule.mask.dim() == 4:
        whole = with_heads(rule.visible(slice(0, queries), (queries, keys), device))
        padded = F.pad(whole, (0, len(first) * block_k - keys, 0, len(rows) * block_q - queries))
        seen = padded.unflatten(3, (-1, block_k)).any(dim=4).unflatten(2, (-1, block_q)).any(dim=3)
    elif rule.causal:
        seen = first <= own_last[..., None]
    else:
        seen = torch.ones(1, 1, len(rows), len(first), dtype=torch.bool, device=device)
    real = F.pad(key_order(rule, queries, keys, device), (1, 0))
    seen = seen & (real[:, last + 1] > real[:, first])[:, None, None]
    before = order[..., first] - 1 if rule.order is not None else real[:, None, first]  # real keys before each block
    if rule.window is not None and (rule.mask is None or rule.mask.dim() == 2):
        seen = seen & (gap() < rule.window)
    if window is not None:
        check_counted(window, uncounted=rule.uncounted)
        if rule.sequence is not None or rule.place is not None:  # a block may hold the first keys of a later text
            place = F.pad(sequence_order(rule, order) - 1, (0, len(first) * block_k - keys), value=UNBOUNDED)
            before = place.unflatten(-1, (-1, block_k)).amin(dim=-1)
        seen = seen & ((gap() < window.recent[:, None, None]) | (before[:, :, None] < window.sinks[:, None, None]))
    return seen


def block_means(tensor: torch.Tensor, block: int, real: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of every block of tokens, as MoBA's router takes it of keys (arXiv 2502.13189, section 2.2).

    Args:
        tensor: `(B, H, T, D)`.
        block: tokens per block; the last one may be shorter.
        real: `(B or 1, T)` bool: the tokens that count; the others are padding.

    Returns:
        `(B, H, ceil(T / block), D)` in float32 at least; zeros for a block without tokens that count.
    """
    batch, heads, length, dim = tensor.shape
    total = -(-length // block)
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    counts = wide.new_ones(1, length) if real is None else real.to(wide.dtype)
    padding = total * block - length
    sums = F.pad(wide * counts[:, None, :, None], (0, 0, 0, padding)).view(batch, heads, total, block, dim).sum(dim=3)
    numbers = F.pad(counts, (0, padding)).view(len(counts), total, block).sum(dim=-1)
    return sums / numbers.clamp(min=1)[:, None, :, None]


def select_blocks(
    scores: torch.Tensor,
    rule: AttentionRule,
    *,
    queries: int,
    keys: int,
    block_q: int,
    block_k: int,
    top_k: int | None = None,
    top_p: float | None = None,
) -> BlockLists:
    """Lists of the key blocks that score best, of those that a query block sees; no gradient passes.

    The blocks that hold the queries' own keys are always among them. With blocks of more than one query a selection is
    shared, so a query's depends on the later ones of its block; `block_q=1` is strictly causal.

    Args:
        scores: `(B, H, Qb, Kb)`, the higher the better.
        rule: visibility.
        queries: their number.
        keys: their number.
        block_q: queries per block.
        block_k: keys per block.
        top_k: how many blocks, own ones among them (MoBA); more only where there are more own ones.
        top_p: as many of the best as have at least this share of the softmax of the scores, in (0, 1].

    Raises:
        ValueError: wrong shape, not exactly one of `top_k` and `top_p`, or one out of range.
    """
    shape = (-(-queries // block_q), -(-keys // block_k))
    if scores.dim() != 4 or scores.shape[2:] != shape:
        raise ValueError(f"Expected scores (B, H, {shape[0]}, {shape[1]}), got {tuple(scores.shape)}.")
    if (top_k is None) == (top_p is None):
        raise ValueError(f"Give one of top_k and top_p, got top_k={top_k} and top_p={top_p}.")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"Expected top_k >= 1 or 0 < top_p <= 1, got top_k={top_k} and top_p={top_p}.")
    seen = seen_blocks(rule, queries=queries, keys=keys, block_q=block_q, block_k=block_k, device=scores.device)
    first, last, own_first, own_last = _ends(rule, queries, keys, block_q, block_k, scores.device)
    own = ((first <= own_last[..., None]) & (last >= own_first[..., None])) & seen
    wide = scores.detach().to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~seen, float("-inf"))
    if top_k is not None:
        best = wide.masked_fill(own, float("inf")).topk(min(top_k, shape[1]), dim=-1).indices
        most = min(shape[1], max(top_k, -(-block_q // block_k) + 1))
    elif top_p is not None:
        shares, best = wide.softmax(dim=-1).nan_to_num(0.0).sort(dim=-1, descending=True, stable=True)
        best = best.masked_fill(shares.cumsum(dim=-1) - shares >= top_p, shape[1])  # enough without it
        most = shape[1]
    chosen = seen.new_zeros(*scores.shape[:3], shape[1] + 1).scatter(-1, best, True)[..., :-1]
    return lists_from_mask((chosen & seen) | own, block_q, block_k, most=most)


def _ends(
    rule: AttentionRule, queries: int, keys: int, block_q: int, block_k: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """First and last key of every key block (Kb,), and of the own keys of every query block (B or 1, H or 1, Qb)."""
    first = torch.arange(0, keys, block_k, device=device)
    rows = torch.arange(0, queries, block_q, device=device)
    own = own_keys(rule, queries, keys, device)
    last = (first + block_k).clamp(max=keys) - 1
    return first, last, own[..., rows], own[..., (rows + block_q).clamp(max=queries) - 1]
