"""Routed attention on a CPU: the selected rows of a kv head are gathered, and SDPA attends for those alone."""

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from .dense_attention_cpu import flash, merged
from .key_mask import unsupported
from .rows import AttentionRule

# Measured on two cores, 12 heads of 64, float32: with fewer queries or keys, or with a larger share of the pairs
# selected, dense attention is about as fast.
SHORTEST = 768
LARGEST_SHARE = 0.8
# Dense causal attention leaves out what is masked. Gathered rows of a block see the keys up to its first row's alike,
# which is a call without a mask; only for those up to its last row's they need one. So they cost this much more a pair,
# and that must leave enough of a gain.
CAUSAL_SHORTEST = 1536
CAUSAL_COST = 1.3
CAUSAL_GAIN = 0.87
# With gradients, which torch's log-sum-exp has not, they need a mask for all keys. So only kv heads with a small share
# gain, and what they leave out must be enough of the whole.
CAUSAL_SHARE = 1 / 3
CAUSAL_SAVING = 0.45
CAUSAL_ROWS = 128  # rows that are attended together, over the keys up to the last one of theirs
PREFIX_ROWS = 256  # likewise, over the keys up to the first one's: products of more rows are faster
# Kv heads whose numbers of pairs differ by less than this factor are attended in one call.
UNEVENNESS = 1.25


def routed_on_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gate: torch.Tensor, rule: AttentionRule
) -> torch.Tensor | None:
    """`routed_attention` where leaving out what is not selected is worth its gathering; plain torch, with gradients.

    It is not in short sequences (decoding among them), where most pairs are selected, and where what a query sees is
    neither all real keys nor all keys up to its own. Compiled and traced calls are left out as well: how many rows
    there are to gather depends on the values of the gate.

    Args:
        query: as of `routed_attention`.
        key: as of `routed_attention`.
        value: as of `routed_attention`.
        gate: as of `routed_attention`.
        rule: as of `routed_attention`.

    Returns:
        As `routed_attention`, or `None`: compute it in another way. It is the same up to rounding.
    """
    rows, keys = query.shape[2], key.shape[2]
    shortest = CAUSAL_SHORTEST if rule.causal else SHORTEST
    if min(rows, keys) < shortest or unsupported(rule) is not None or torch.compiler.is_compiling():
        return None
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return None
    seen = _seen(rule, rows, keys)
    if seen is None:
        return None
    learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    # as Triton's kernels do: in one dtype, that of values
    with torch.autocast("cpu", enabled=False):
        return _gathered(query.to(value.dtype), key.to(value.dtype), value, gate, rule, seen, learns)


def _gathered(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    rule: AttentionRule,
    seen: torch.Tensor,
    learns: bool,
) -> torch.Tensor | None:
    """`routed_on_cpu` of operands in one dtype, where it computes them; `None` where too little is left out."""
    batch, heads, rows, _ = query.shape
    groups = key.shape[1]
    # A pair is a token and a query head. Those that share a kv head see the same keys: one list of them per sequence
    # and kv head, in the order of tokens.
    selected = (gate != 0).reshape(batch, rows, groups, -1).transpose(1, 2) & seen.any(dim=-1)[:, None, None, None]
    counts: list[list[int]] = selected.sum(dim=(2, 3)).tolist()
    if not _pays(counts, gate.numel(), rule.causal, learns):
        return None
    pairs = torch.arange(gate.numel()).view(batch, rows, groups, -1).transpose(1, 2)
    lists = pairs[selected].split([count for own in counts for count in own])
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
        for pack in packs[sequence]:
            pack_keys, pack_values = _heads(own_keys, pack), _heads(own_values, pack)
            chosen = gathered[len(outputs)].view(1, len(pack_keys), -1, flat.shape[-1])
            if rule.causal:
                tokens = targets[len(outputs)].clamp(max=len(flat) - 1) // heads % rows
                output = _causal(chosen, pack_keys[None], pack_values[None], tokens, rule.scaling, learns)
            else:
                output = scaled_dot_product_attention(chosen, pack_keys[None], pack_values[None], scale=rule.scaling)
            outputs.append(output.flatten(0, 2))
    scale = torch.cat([gate.flatten(), gate.new_zeros(1)]).index_select(0, target)
    gated = torch.cat(outputs).to(value.dtype) * scale[:, None].to(value.dtype)
    result = gated.new_zeros(len(flat) + 1, value.shape[-1]).index_copy_(0, target, gated)
    return result[:-1].view(batch, rows, heads, -1).transpose(1, 2)


def _causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tokens: torch.Tensor,
    scaling: float,
    learns: bool,
) -> torch.Tensor:
    """Attention of rows `(1, G, N, D)` in the order of their tokens `(G, N)` to the keys up to those.

    Where it `learns`, it has gradients.
    """
    count, keys = tokens.shape[1], key.shape[2]
    heads = count // keys
    if count == heads * keys > 0 and bool((tokens == torch.arange(count) // heads).all()):  # every row of every head
        whole = query.unflatten(2, (keys, heads)).transpose(2, 3).flatten(1, 2)
        key, value = key.repeat_interleave(heads, dim=1), value.repeat_interleave(heads, dim=1)
        output = scaled_dot_product_attention(whole, key, value, is_causal=True, scale=scaling)
        return output.unflatten(1, (-1, heads)).transpose(2, 3).flatten(2, 3)
    outputs, step = [], CAUSAL_ROWS if learns else PREFIX_ROWS
    memory = key.new_empty(
        0 if learns else len(tokens) * CAUSAL_ROWS * keys, dtype=torch.promote_types(key.dtype, torch.float32)
    )
    for part, own in zip(query.split(step, dim=2), tokens.split(step, dim=1), strict=True):
        if not learns:
            outputs.append(_in_two_parts(part, key, value, own, scaling, memory))
            continue
        first, last = int(own.min()), int(own.max())
        mask = query.new_zeros(*part.shape[:3], last + 1)
        mask[..., first:].masked_fill_(torch.arange(first, last + 1) > own[..., None], float("-inf"))
        up_to = slice(last + 1)
        outputs.append(
            scaled_dot_product_attention(part, key[:, :, up_to], value[:, :, up_to], attn_mask=mask, scale=scaling)
        )
    return torch.cat(outputs, dim=2)


def _in_two_parts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    own: torch.Tensor,
    scaling: float,
    memory: torch.Tensor,
) -> torch.Tensor:
    """The keys up to the first row's, which all rows see, without a mask; those after it with one; both merged."""
    first = int(own.min())
    output, lse = flash(query, key[:, :, : first + 1], value[:, :, : first + 1], scaling)
    for start in range(0, own.shape[1], CAUSAL_ROWS):
        some = slice(start, start + CAUSAL_ROWS)
        rows = own[:, some]
        low, last = int(rows.min()), int(rows.max())
        if first == last:
            continue
        hidden = memory[: rows.numel() * (last - first)].view(1, *rows.shape, last - first).zero_()
        hidden[..., low - first :].masked_fill_(torch.arange(low + 1, last + 1) > rows[..., None], float("-inf"))
        rest = slice(first + 1, last + 1)
        other, other_lse = flash(query[:, :, some], key[:, :, rest], value[:, :, rest], scaling, hidden=hidden)
        other_lse = other_lse.masked_fill((rows == first)[None], float("-inf"))  # such rows see none of these
        both = merged(output[:, :, some], lse[:, :, some], other, other_lse)[0]
        output[:, :, some] = both.to(output.dtype)
    return output.to(value.dtype)


def _seen(rule: AttentionRule, rows: int, keys: int) -> torch.Tensor | None:
    """`(B or 1, Tk)` bool: the keys that all queries of a sequence see, but for causality; `None` if there is more."""
    mask = rule.mask
    if rule.window is not None or rule.sequence is not None:
        return None
    if rule.causal and (rows != keys or rule.offset or mask is not None):
        return None
    if mask is None:
        return torch.ones(1, keys, dtype=torch.bool)
    if mask.dim() == 2:
        return mask[:, :keys].bool()
    first, last = mask[:, 0, 0, :keys], mask[:, 0, -1, :keys]
    if not torch.equal(first, last):  # under causal masks this says it already
        return None
    return first if bool((mask[:, 0, :, :keys] == first[:, None]).all()) else None


def _pays(counts: list[list[int]], pairs: int, causal: bool, learns: bool) -> bool:
    """Whether enough of the pairs are left out, from the number of those selected per sequence and kv head."""
    shares = [count * sum(map(len, counts)) / pairs for own in counts for count in own]
    if not any(shares):
        return False  # there is nothing to attend
    if not causal:
        return sum(shares) <= LARGEST_SHARE * len(shares)
    if learns:
        return sum(1 - share for share in shares if share <= CAUSAL_SHARE) >= CAUSAL_SAVING * len(shares)
    # a kv head that keeps everything is dense attention
    return sum(1.0 if share == 1.0 else CAUSAL_COST * share for share in shares) <= CAUSAL_GAIN * len(shares)


def _packs(counts: list[int]) -> list[list[int]]:
    """Kv heads that have pairs, in groups of which each has about as many."""
    packs: list[list[int]] = []
    for member in sorted((i for i, count in enumerate(counts) if count), key=counts.__getitem__, reverse=True):
        if packs and counts[packs[-1][0]] < UNEVENNESS * counts[member]:
            packs[-1].append(member)
        else:
            packs.append([member])
    return [sorted(pack) for pack in packs]


def _heads(tensor: torch.Tensor, pack: list[int]) -> torch.Tensor:
    """Those of a pack, without gaps: torch's kernel is faster on them by more than the copies cost."""
    if pack[-1] - pack[0] == len(pack) - 1:
        return tensor[pack[0] : pack[-1] + 1].contiguous()
    return tensor.index_select(0, torch.tensor(pack))
