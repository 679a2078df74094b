"""Heads with sinks and recent keys on a CPU, by slices: recent keys lie side by side, and so do the sinks.

The rows that see every key up to their own are one call of causal attention; so there is nothing to lose where windows
are as long as the sequence. Of the others a block attends to its recent keys under one small mask, the same for all
blocks, and to the sinks without any; what comes of both is merged by the log-sum-exp.
"""

import torch

from .block_lists import SinkAndRecent
from .dense_attention_cpu import flash, merged
from .rows import AttentionRule

ROWS = 64  # queries that share their recent keys: of those of a block, as many more than each sees are computed


def in_slices(rule: AttentionRule, device: torch.device) -> bool:
    """Whether `by_slices` computes a call: causal, and nothing but sinks and recent keys decides what is seen."""
    hiding = (rule.mask, rule.window, rule.sequence)
    return device.type == "cpu" and rule.causal and all(some is None for some in hiding)


def by_slices(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keep: SinkAndRecent, rule: AttentionRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `(B, H, Tq, Dv)` in the dtype of the operands and log-sum-exp `(B, H, Tq)`, without a graph.

    Args:
        query: `(B, H, Tq, D)`.
        key: `(B, G, Tk, D)`.
        value: `(B, G, Tk, Dv)`.
        keep: sinks and recent keys of every head.
        rule: such that it is computed `in_slices`; own keys of the queries are among the keys.
    """
    batch, heads, rows, _ = query.shape
    groups, keys = key.shape[1:3]
    offset = keys - rows if rule.offset is None else rule.offset
    output = value.new_zeros(batch, rows, heads, value.shape[-1]).transpose(1, 2)
    dtype = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_full((batch, heads, rows), float("-inf"), dtype=dtype)
    key, value = key.contiguous(), value.contiguous()
    sizes: dict[tuple[int, int], list[int]] = {}
    for head, size in enumerate(zip(keep.sinks.tolist(), keep.recent.tolist(), strict=True)):
        sizes.setdefault(size, []).append(head)
    for (sinks, recent), alike in sizes.items():
        states, some = [query, key, value], torch.tensor(alike)
        if len(sizes) > 1:
            group = some // (heads // groups)
            states = [query[:, some], key[:, group], value[:, group]]
        for part, found, sums in _parts(states, sinks, recent, offset, rule.scaling, dtype):
            of = (slice(None), slice(None) if len(sizes) == 1 else some, part)
            output[of] = found.to(output.dtype)
            lse[of] = sums
    return output, lse


def _parts(
    states: list[torch.Tensor], sinks: int, recent: int, offset: int, scaling: float, dtype: torch.dtype
) -> list[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Which rows, their output and their log-sum-exp."""
    query, key, value = states
    rows, found = query.shape[2], []

    def attend(part: slice, begin: int, end: int, **how: object) -> tuple[torch.Tensor, torch.Tensor]:
        of_keys = slice(begin, end)
        return flash(query[:, :, part], key[:, :, of_keys], value[:, :, of_keys], scaling, **how)  # type: ignore[arg-type]

    dense = min(rows, max(0, sinks + recent - offset))  # rows that see all keys up to their own
    if dense:
        part, end = slice(0, dense), offset + dense
        later = torch.arange(end) > torch.arange(offset, end)[:, None]
        how = {"causal": True} if offset == 0 else {"hidden": _hidden(later, dtype)}
        found.append((part, *attend(part, 0, end, **how)))
    # own key at recent - 1 + row: neither later than that nor `recent` or more before it
    place = torch.arange(ROWS + recent - 1) - torch.arange(ROWS)[:, None]
    band = _hidden((place < 0) | (place >= recent), dtype)
    for start in range(dense, rows, ROWS):
        part = slice(start, min(start + ROWS, rows))
        count, end = part.stop - start, offset + part.stop
        pieces = []
        if recent:
            how = {"hidden": band[:count, : count + recent - 1]}
            pieces.append(attend(part, offset + start - recent + 1, end, **how))
        if sinks:
            pieces.append(attend(part, 0, sinks))
        if pieces:
            found.append((part, *(merged(*pieces[0], *pieces[1]) if len(pieces) == 2 else pieces[0])))
    return found


def _hidden(hides: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(hides.shape, dtype=dtype).masked_fill_(hides, float("-inf"))
