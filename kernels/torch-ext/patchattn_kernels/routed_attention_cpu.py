"""Routed attention on a CPU: the selected rows of a kv head are gathered, and SDPA attends for those alone."""

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from .key_mask import unsupported
from .rows import AttentionRule

# Measured on two cores, 12 heads of 64, float32: with fewer queries or keys, or with a larger share of the pairs
# selected, dense attention is about as fast.
SHORTEST = 768
LARGEST_SHARE = 0.8
# Kv heads whose numbers of pairs differ by less than this factor are attended in one call.
UNEVENNESS = 1.25


def routed_on_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gate: torch.Tensor, rule: AttentionRule
) -> torch.Tensor | None:
    """`routed_attention` where leaving out what is not selected is worth its gathering; plain torch, with gradients.

    It is not where queries see different keys (causal attention, windows, packed sequences), in short sequences
    (decoding among them), and where most pairs are selected. Compiled and traced calls are left out as well: how many
    rows there are to gather depends on the values of the gate.

    Args:
        query, key, value, gate, rule: as `routed_attention` takes them.

    Returns:
        As `routed_attention`, or `None`: compute it in another way. It is the same up to rounding.
    """
    batch, heads, rows, _ = query.shape
    groups, keys = key.shape[1], key.shape[2]
    if min(rows, keys) < SHORTEST or unsupported(rule) is not None or torch.compiler.is_compiling():
        return None
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return None
    seen = _seen_by_every_row(rule, keys)
    if seen is None:
        return None
    # A pair is a token and a query head. Those that share a kv head see the same keys: one list of them per sequence
    # and kv head, whichever of its heads they are of.
    pairs = torch.arange(gate.numel()).view(batch, rows, groups, -1).transpose(1, 2)
    selected = (gate != 0).reshape(batch, rows, groups, -1).transpose(1, 2) & seen.any(dim=-1)[:, None, None, None]
    counts: list[list[int]] = selected.sum(dim=(2, 3)).tolist()
    lists = pairs[selected].split([count for own in counts for count in own])
    if not 0 < sum(map(len, lists)) <= LARGEST_SHARE * gate.numel():
        return None
    packs = [_packs(own) for own in counts]
    # shorter lists of a pack are filled up with one pair too many, which is dropped at the end
    targets = [
        pad_sequence([lists[sequence * groups + i] for i in pack], batch_first=True, padding_value=gate.numel())
        for sequence, own in enumerate(packs)
        for pack in own
    ]
    target = torch.cat([target.flatten() for target in targets])
    flat = query.transpose(1, 2).flatten(0, 2)
    gathered = flat.index_select(0, target.clamp(max=len(flat) - 1)).split([target.numel() for target in targets])
    outputs: list[torch.Tensor] = []
    for sequence, (own_keys, own_values) in enumerate(zip(key.unbind(), value.unbind(), strict=True)):
        real = seen[min(sequence, len(seen) - 1)]
        if not real.all():
            own_keys, own_values = own_keys[:, real], own_values[:, real]
        sizes = [len(pack) for pack in packs[sequence]]
        order = torch.tensor([i for pack in packs[sequence] for i in pack], dtype=torch.long)
        # SDPA is faster on keys and values without gaps, as index_select makes them, by more than the copies cost
        for pack_keys, pack_values in zip(
            own_keys.index_select(0, order).split(sizes), own_values.index_select(0, order).split(sizes), strict=True
        ):
            chosen = gathered[len(outputs)].view(1, len(pack_keys), -1, flat.shape[-1])
            output = scaled_dot_product_attention(chosen, pack_keys[None], pack_values[None], scale=rule.scaling)
            outputs.append(output.flatten(0, 2))
    scale = torch.cat([gate.flatten(), gate.new_zeros(1)]).index_select(0, target)
    gated = torch.cat(outputs).to(value.dtype) * scale[:, None].to(value.dtype)
    result = gated.new_zeros(len(flat) + 1, value.shape[-1]).index_copy_(0, target, gated)
    return result[:-1].view(batch, rows, heads, -1).transpose(1, 2)


def _seen_by_every_row(rule: AttentionRule, keys: int) -> torch.Tensor | None:
    """`(B or 1, Tk)` bool: the keys that all queries of a sequence see; `None` where not all see the same."""
    mask = rule.mask
    if rule.causal or rule.window is not None or rule.sequence is not None:
        return None
    if mask is None:
        return torch.ones(1, keys, dtype=torch.bool)
    if mask.dim() == 2:
        return mask[:, :keys].bool()
    first = mask[:, 0, 0, :keys]
    return first if bool((mask[:, 0, :, :keys] == first[:, None]).all()) else None


def _packs(counts: list[int]) -> list[list[int]]:
    """Kv heads that have pairs, in groups of which each has about as many."""
    packs: list[list[int]] = []
    for member in sorted((i for i, count in enumerate(counts) if count), key=counts.__getitem__, reverse=True):
        if packs and counts[packs[-1][0]] < UNEVENNESS * counts[member]:
            packs[-1].append(member)
        else:
            packs.append([member])
    return packs
