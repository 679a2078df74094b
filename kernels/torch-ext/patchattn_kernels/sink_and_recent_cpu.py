"""Heads with sinks and recent keys on a CPU, by slices: recent keys lie side by side, and so do the sinks.

The first rows, which see every key up to their own, are one call of causal attention; so there is nothing to lose where
windows are as long as the sequence. Each block of the others is one call too, under a small mask that is the same for
all blocks: its sinks are copied to just before its recent keys, over keys that neither it nor later rows see. Keys are
copied for that, but for those of blocks that begin so early that little lies between.
"""

from collections.abc import Iterator

import torch

from .block_lists import SinkAndRecent
from .dense_attention_cpu import flash
from .rows import AttentionRule

# Queries that share their recent keys: of those of a block, as many more than each sees are computed. Products of more
# queries are faster, by more than that once there are more recent keys than that.
ROWS, MORE_ROWS = 64, 256
GAP = 64  # keys between the sinks and a long window that are computed and hidden, rather than the others copied


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
    sizes: dict[tuple[int, int], list[int]] = {}
    for head, size in enumerate(zip(keep.sinks.tolist(), keep.recent.tolist(), strict=True)):
        sizes.setdefault(size, []).append(head)
    if offset == 0 and all(sum(size) >= rows for size in sizes):
        output, lse = flash(query, key[:, :, :rows], value[:, :, :rows], rule.scaling, causal=True)
        return output.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()
    output = value.new_empty(batch, rows, heads, value.shape[-1]).transpose(1, 2)
    dtype = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_full((batch, heads, rows), float("-inf"), dtype=dtype)
    for (sinks, recent), alike in sizes.items():
        states, some = [query, key, value], torch.tensor(alike)
        if sinks + recent == 0:
            output[:, some] = 0.0
            continue
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
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Which rows, their output and their log-sum-exp."""
    query, key, value = states
    rows, keys = query.shape[2], key.shape[2]
    sinks, recent = min(sinks, keys), min(recent, keys)
    step = min(rows, ROWS if recent <= MORE_ROWS else MORE_ROWS)
    same = min(rows, sinks + recent) if offset == 0 else 0  # rows that see all keys up to their own
    starts = [max(0, stop - step) for stop in range(rows, same, -step)][::-1]  # the first block is what is left
    same = starts[0] if starts else rows
    lows = [offset + start - recent + 1 for start in starts]  # first recent keys of the blocks' first rows
    gap = GAP if recent > MORE_ROWS else 0
    far = [low for low in lows if low - sinks > gap]
    begin = far[0] - sinks if far and sinks else 0
    copies = [
        tensor[:, :, begin : offset + rows].clone(memory_format=torch.contiguous_format) if begin else tensor
        for tensor in (key, value)
    ]
    if same:
        yield slice(same), *flash(query[:, :, :same], key[:, :, :same], value[:, :, :same], scaling, causal=True)
    usual = None
    for start, stop, low in zip(starts, [*starts, rows][1:], lows, strict=True):
        part = slice(start, stop)
        if low - sinks <= gap:
            of_keys, hidden = slice(offset + stop), _hidden(stop - start, sinks, recent, offset + start, dtype)
            yield part, *flash(query[:, :, part], key[:, :, of_keys], value[:, :, of_keys], scaling, hidden=hidden)
            continue
        usual = _hidden(step, sinks, recent, sinks + recent - 1, dtype) if usual is None else usual
        hidden = usual[: stop - start, : sinks + recent + stop - start - 1]
        first = low - sinks - begin
        if sinks:
            for copy, given in zip(copies, (key, value), strict=True):
                copy[:, :, first : first + sinks] = given[:, :, :sinks]
        own_keys, own_values = (copy[:, :, first : offset + stop - begin] for copy in copies)
        yield part, *flash(query[:, :, part], own_keys, own_values, scaling, hidden=hidden)


def _hidden(rows: int, sinks: int, recent: int, own: int, dtype: torch.dtype) -> torch.Tensor:
    """`(rows, own + rows)`: 0 for sinks and recent keys, else -inf; the first row's own key is the one at `own`."""
    nothing = torch.full((rows, own + rows), float("-inf"), dtype=dtype)
    old = nothing.tril(own - recent)
    old[:, :sinks] = 0.0
    return old.add_(nothing.triu_(own + 1))
