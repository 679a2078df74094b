"""Attention weights, some query rows at a time: what the operations on weights share. Plain torch.

Shapes: B batch, H query heads, G kv heads, Tq queries, Tk keys, D head dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

BLOCK = 2**23  # weights held at a time: 32 MB in float32
FEW = 64  # queries times query heads of a kv head that are one tile of the kernels that decode
# Half of -1e4, the smallest number that masks are filled with: see `seen_by`.
MASKED = -5000.0


@dataclass(frozen=True, eq=False)
class AttentionRule:
    """How logits come from queries and keys, and which keys each query sees.

    Attributes:
        scaling: factor of the logits.
        softcap: logits become `softcap * tanh(logits / softcap)`.
        bias: `(B or 1, H or 1, Tq, Tk)`, added to the logits.
        sinks: `(H,)` a further logit per head in the softmax, without a value.
        mask: `(B, Tk)`, true of real keys; or `(B or 1, H or 1, Tq, Tk)`, bool, or added to the logits, where `seen_by`
            tells a key that is not seen from a bias. `None`: all keys are real.
        causal: queries see no key after their own.
        offset: own key of the first query; `None`: Tk - Tq, the last query's is the last.
        window: queries see only keys less than this many real keys away.
        sequence: `(Tk,)` number of the sequence each key is of, where one row holds several.
        order: `(B or 1, H or 1, Tk)` int, ascending: real keys of the sequence up to each one, itself included, those
            counted that are not among the Tk. For sinks and recent keys; `None`: the Tk are all there ever were.
        own: `(B or 1, Tq)` int: the same of the queries' own keys, which need not be among the Tk; with `order`.
        place: `(B or 1, H or 1, Tk)` int: those of keys, each counted from the start of its own sequence, where a 4-dim
            mask holds several; for sinks. `None`: by `sequence`, else they are `order`.
        uncounted: whether it is not known how many real keys came before; sinks are then refused.
    """

    scaling: float
    softcap: float | None = None
    bias: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    causal: bool = False
    offset: int | None = None
    window: int | None = None
    sequence: torch.Tensor | None = None
    order: torch.Tensor | None = None
    own: torch.Tensor | None = None
    place: torch.Tensor | None = None
    uncounted: bool = False

    def visible(
        self,
        rows: slice | torch.Tensor,
        shape: tuple[int, int],
        device: torch.device,
        columns: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`(B or 1, C, Tk)` bool: which keys some queries see, a slice or `(C,)` of them; `shape` is (Tq, Tk) of all.

        `(B or 1, H, C, Tk)` where the mask has more than one head. With `columns`, `(K,)` numbers of keys, only those
        are asked for, and there are K in place of Tk.
        """
        queries, keys = shape
        mask = self.mask
        key = torch.arange(keys, device=device) if columns is None else columns
        if mask is not None and mask.dim() == 4:
            part = mask[:, :, rows, :keys] if columns is None else mask[:, :, rows][..., columns]
            return seen_by(part).squeeze(1)
        real = torch.ones(1, keys, dtype=torch.bool, device=device) if mask is None else mask.bool()
        query = torch.arange(queries, device=device)[rows] + (keys - queries if self.offset is None else self.offset)
        visible = (real if columns is None else real[:, columns])[:, None].expand(-1, len(query), -1)
        if self.causal:
            visible = visible & (key <= query[:, None])
        if self.window is not None:
            order = real.long().cumsum(-1)
            own = query.clamp(0, keys - 1)
            own = order[:, own] + (query - own)  # beyond either end every place counts
            visible = visible & ((own[..., None] - order[:, None, key]).abs() < self.window)
        if self.sequence is not None:
            if self.offset is not None and (self.offset < 0 or self.offset + queries > keys):
                raise ValueError(
                    f"Expected own keys of queries among the {keys} keys where sequences are packed, got "
                    f"{self.offset} to {self.offset + queries - 1}: their sequence would not be known."
                )
            visible = visible & (self.sequence[query, None] == self.sequence[key])
        return visible

    def shows_all(self, queries: int, keys: int) -> bool:
        """Whether each of so many queries sees each of so many keys, as structure alone says."""
        ends = not self.causal or (keys - queries if self.offset is None else self.offset) + 1 >= keys
        return ends and self.mask is None and self.window is None and self.sequence is None

    def added(self, rows: slice | torch.Tensor, keys: int) -> Iterator[torch.Tensor]:
        """What is added to the logits of some queries, `(B or 1, H or 1, C, Tk)` each."""
        for term in (self.bias, self.mask):
            if term is not None and term.dim() == 4 and term.is_floating_point():
                yield term[:, :, rows, :keys]


def seen_by(mask: torch.Tensor) -> torch.Tensor:
    """Which keys a dense mask shows, bool in its shape: true entries, or added numbers that are above -5000.

    The softmax decides: a key 5000 below the others gets a weight of exactly 0 in every dtype, since exp underflows at
    -104 in float32 and at -746 in float64. So -inf, the lowest number of any dtype, -1e9 and -1e4 (-9984 in bfloat16)
    hide a key, with or without a bias on top. What lies above is a bias, such as ALiBi's, whose steepest slope reaches
    it 5000 tokens away, where its keys have no weight either.
    """
    return mask if mask.dtype == torch.bool else mask > MASKED


def with_heads(visible: torch.Tensor) -> torch.Tensor:
    """`(B or 1, H or 1, C, Tk)` of what `AttentionRule.visible` gives."""
    return visible if visible.dim() == 4 else visible[:, None]


def blocks(rows: int, width: int) -> Iterator[slice]:
    """Slices of query rows of which each holds about BLOCK weights; `width` is the number of weights in a row.

    An exported program takes all rows at once: how often it would go round depends on their number.
    """
    if torch.compiler.is_exporting():
        yield slice(None)
        return
    size = max(1, BLOCK // max(1, width))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def full_precision(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 at least."""
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()


def row_logits(query: torch.Tensor, key: torch.Tensor, rule: AttentionRule, rows: slice | torch.Tensor) -> torch.Tensor:
    """Logits `(B, H, C, Tk)` of some of the queries; those of keys that a query does not see are -inf.

    Args:
        query: `(B, H, Tq, D)`, in `full_precision`.
        key: `(B, G, Tk, D)`, in `full_precision`; kv heads are not repeated.
        rule: how.
        rows: which queries: a slice, or `(C,)` of their numbers.
    """
    part = query[:, :, rows]
    batch, heads, count, dim = part.shape
    groups, keys = key.shape[1], key.shape[2]
    # the query heads of a group as further rows: one product per kv head
    logits = (part.reshape(batch, groups, -1, dim) @ key.mT).view(batch, heads, count, keys) * rule.scaling
    if rule.softcap is not None:
        logits = torch.tanh(logits / rule.softcap) * rule.softcap
    for term in rule.added(rows, keys):
        logits = logits + term
    if query.shape[2] == 1 and rule.shows_all(1, keys):
        return logits
    visible = with_heads(rule.visible(rows, (query.shape[2], keys), key.device))
    return logits.masked_fill(~visible, float("-inf"))


def is_empty(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether there is no batch, query or key: no weight, so that there is nothing to launch or to go through."""
    return 0 in (query.shape[0], query.shape[2], key.shape[2])


def are_few(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether the queries of all query heads of a kv head are one tile of the kernels that decode."""
    return query.shape[2] * query.shape[1] // key.shape[1] <= FEW


def empty_weights(
    query: torch.Tensor, key: torch.Tensor, rule: AttentionRule, lse: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights `(B, H, Tq, Tk)` without elements, where `is_empty`, and log-sum-exp of the rows; in the graph of both.

    What is computed from them has the shapes, and its operands the gradients, that the formula says: zeros, where there
    are any.

    Args:
        query: `(B, H, Tq, D)`.
        key: `(B, G, Tk, D)`.
        rule: scaling and visibility.
        lse: `(B, H, Tq)` where it is known.
    """
    query, key = full_precision(query), full_precision(key)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query @ key.mT
    for term in rule.added(slice(0, query.shape[2]), key.shape[2]):
        logits = logits + term
    lse = log_sum_exp(logits, rule) if lse is None else lse
    return weights_of(logits, lse), lse


def empty_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: AttentionRule, lse: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(B, H, Tq, Dv)` zeros, the product of `empty_weights` with values `(B, G, Tk, Dv)`, and those and the
    log-sum-exp."""
    weights, lse = empty_weights(query, key, rule, lse)
    output = weights @ full_precision(value).repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return output, weights, lse


def log_sum_exp(logits: torch.Tensor, rule: AttentionRule) -> torch.Tensor:
    """Of rows of logits `(B, H, C, Tk)`, sinks included: `(B, H, C)`; -inf where a query sees nothing."""
    lse = torch.logsumexp(logits, dim=-1)
    return lse if rule.sinks is None else torch.logaddexp(lse, rule.sinks.to(lse.dtype)[None, :, None])


def weights_of(logits: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Softmax by a known log-sum-exp `(B, H, C)`; zeros where a query sees nothing."""
    return torch.exp(logits - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None])
