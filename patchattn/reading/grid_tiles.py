"""Attention of an image's tokens in tiles: some queries and all keys that any of them sees, as neighbours share them.

Which positions along an axis see which is said in plain numbers: `Sets`, of each position those that it sees.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..core.call import AttentionCall

Sets = tuple[tuple[int, ...], ...]
_WORTH = 0.5  # of the pairs of queries and keys: with more, tiles save too little
_GATHERING = 32  # to copy a key and its value into a tile takes as long as about so many products with them
_CALLING = 2048  # and to attend to tiles of one more size as long as so many
_MOST_CUTS = 16  # numbers of pieces that are tried


class Seen(NamedTuple):
    """What tokens see of an image, in some neighbouring query heads: rows and columns by one rule each.

    Attributes:
        rows: of each row of patches, the rows that its patches see, ascending.
        columns: likewise of columns; a patch sees those of its rows that are in its columns.
        heads: how many query heads; `None`: all.
    """

    rows: Sets
    columns: Sets
    heads: int | None = None

    @property
    def is_all(self) -> bool:
        """Whether every patch sees every patch."""
        return all(len(seen) == len(sets) for sets in (self.rows, self.columns) for seen in sets)


class Tile(NamedTuple):
    """Tiles of one size.

    Attributes:
        queries: `(G, Q)` numbers of tokens.
        keys: `(G, K)` likewise; `None`: all tokens.
        mask: `(G, Q, K)` added to logits: which of these keys each query sees; `None`: all.
    """

    queries: torch.Tensor
    keys: torch.Tensor | None
    mask: torch.Tensor | None


class Tiling(NamedTuple):
    """How attention of some neighbouring heads is computed.

    Attributes:
        heads: how many query heads; `None`: all.
        tiles: one after another.
        place: `(T,)` where each token is among the queries of all tiles.
    """

    heads: int | None
    tiles: tuple[Tile, ...]
    place: torch.Tensor


class _Part(NamedTuple):
    """Some positions of an axis, what they see together, and, where it is not all of it, what each does."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    sees: tuple[tuple[bool, ...], ...] | None


def alike(labels: Sequence[int]) -> Sets:
    """Positions see those of their own label."""
    return tuple(tuple(other for other, name in enumerate(labels) if name == label) for label in labels)


def pairs(seen: Seen, device: torch.device) -> torch.Tensor:
    """`(N, N)` bool: which patches each patch sees, row by row."""
    rows, columns = (_matrix(sets, device) for sets in (seen.rows, seen.columns))
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)


def tilings(
    seen: Sequence[Seen], order: torch.Tensor, prefix: int, heads: int, dtype: torch.dtype
) -> tuple[Tiling, ...] | None:
    """How to compute attention of one image in tiles; `None` where it would not be much less work.

    Args:
        seen: what its patches see, by heads.
        order: `(N,)` number of the token of each patch, row by row.
        prefix: how many first tokens see all, and are seen by all.
        heads: number of query heads.
        dtype: of queries.
    """
    parts = [_axes(one) for one in seen]
    tokens, work = prefix + len(order), 0
    for one, (rows, columns) in zip(seen, parts, strict=True):
        of_patches = sum(
            (len(y.queries) * len(x.queries) + _GATHERING) * (prefix + len(y.keys) * len(x.keys))
            for y in rows
            for x in columns
        )
        work += (one.heads or heads) * (of_patches + prefix * tokens)
    if work > _WORTH * heads * tokens**2:
        return None
    return tuple(_tiling(one, *axes, order, prefix, dtype) for one, axes in zip(seen, parts, strict=True))


def attend_tiles(call: AttentionCall, tiled: Sequence[Tiling]) -> torch.Tensor:
    """`(B, T, H, D)` of a call whose queries and keys are the same tokens."""
    query, key, value = (states.transpose(1, 2) for states in (call.query, call.key, call.value))
    if key.shape[2] != query.shape[2]:
        key, value = (s.repeat_interleave(query.shape[2] // s.shape[2], dim=2) for s in (key, value))
    found, start = [], 0
    for tiling in tiled:
        end = start + (tiling.heads or query.shape[2])
        heads = slice(start, end)
        some = query[:, :, heads], key[:, :, heads], value[:, :, heads]
        outputs = [_attend_tile(*some, tile, call.scaling) for tile in tiling.tiles]
        found.append(torch.cat(outputs, dim=1).index_select(1, tiling.place))
        start = end
    return found[0] if len(found) == 1 else torch.cat(found, dim=2)


def _attend_tile(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tile: Tile, scaling: float
) -> torch.Tensor:
    """`(B, G Q, H, D)` of queries `(B, T, H, D)`."""
    batch, mask = len(query), tile.mask
    query = _gathered(query, tile.queries)
    key, value = (
        states.transpose(1, 2) if tile.keys is None else _gathered(states, tile.keys) for states in (key, value)
    )
    if mask is not None:
        mask = mask.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return output.transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2)


def _gathered(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`(B G, H, n, D)` of `(B, T, H, D)` at `(G, n)`."""
    return states.index_select(1, index.flatten()).unflatten(1, index.shape).flatten(0, 1).transpose(1, 2)


def _tiling(
    seen: Seen,
    rows: tuple[_Part, ...],
    columns: tuple[_Part, ...],
    order: torch.Tensor,
    prefix: int,
    dtype: torch.dtype,
) -> Tiling:
    """Tiles of one size are computed together; the first ones are of the prefix, which sees all."""
    device, width = order.device, len(seen.columns)
    first = torch.arange(prefix, device=device)
    tiles = [Tile(first[None], None, None)] if prefix else []
    of_columns = _by_size(columns, device)
    for y in _by_size(rows, device):
        for x in of_columns:
            queries, keys = (order[_products(down * width, across)] for down, across in zip(y[:2], x[:2], strict=True))
            mask = None
            if y.sees is not None or x.sees is not None:
                hidden = F.pad(~_products(y.matrix(), x.matrix()), (prefix, 0))
                mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
            tiles.append(Tile(queries, torch.cat([first.expand(len(keys), -1), keys], dim=1), mask))
    return Tiling(seen.heads, tuple(tiles), torch.cat([tile.queries.flatten() for tile in tiles]).argsort())


class _Parts(NamedTuple):
    """Parts of one size: `(P, Q)` queries, `(P, K)` keys, and `(P, Q, K)` bool which each sees, or `None`: all."""

    queries: torch.Tensor
    keys: torch.Tensor
    sees: torch.Tensor | None

    def matrix(self) -> torch.Tensor:
        shape = (*self.queries.shape, self.keys.shape[1])
        return torch.ones(shape, dtype=torch.bool, device=self.keys.device) if self.sees is None else self.sees


def _by_size(parts: Sequence[_Part], device: torch.device) -> list[_Parts]:
    sizes: dict[tuple[int, int], list[_Part]] = {}
    for part in parts:
        sizes.setdefault((len(part.queries), len(part.keys)), []).append(part)
    return [
        _Parts(
            torch.tensor([part.queries for part in some], device=device),
            torch.tensor([part.keys for part in some], device=device),
            None if some[0].sees is None else torch.tensor([part.sees for part in some], device=device),
        )
        for some in sizes.values()
    ]


def _products(down: torch.Tensor, across: torch.Tensor) -> torch.Tensor:
    """Every part of one axis with every part of the other: sums of numbers `(P, n)`, or both of bool `(P, n, m)`."""
    if down.dtype != torch.bool:
        return (down[:, None, :, None] + across[None, :, None, :]).flatten(2).flatten(0, 1)
    both = down[:, None, :, None, :, None] & across[None, :, None, :, None, :]
    return both.flatten(4).flatten(2, 3).flatten(0, 1)


def _axes(seen: Seen) -> tuple[tuple[_Part, ...], tuple[_Part, ...]]:
    rows = _parts(seen.rows)
    return rows, rows if seen.columns == seen.rows else _parts(seen.columns)


def _parts(sets: Sets) -> tuple[_Part, ...]:
    """Positions that see the same; or, where few do, neighbours whose keys overlap."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for position, keys in enumerate(sets):
        alike.setdefault(keys, []).append(position)
    chains = _chains(sets)
    if 2 * len(alike) <= len(sets) or len(chains) == len(alike):
        return tuple(_Part(tuple(queries), keys, None) for keys, queries in alike.items())
    longest = max(map(len, chains))
    counts = range(1, min(longest, _MOST_CUTS) + 1)
    cuts = [_cut(chains, size, sets) for size in sorted({-(-longest // count) for count in counts})]
    return min(cuts, key=_work)


def _work(parts: Sequence[_Part]) -> int:
    """Of an image with both axes in such parts, in products of a query and a key."""
    products = sum(len(part.queries) * len(part.keys) for part in parts)
    copies = sum(len(part.keys) for part in parts)
    sizes = len({(len(part.queries), len(part.keys)) for part in parts})
    return products**2 + _GATHERING * copies**2 + _CALLING * sizes**2


def _chains(sets: Sets) -> list[list[int]]:
    """Positions, each of which shares keys with the one before it in its chain."""
    chains: list[list[int]] = []
    for position, keys in enumerate(sets):
        chain = next((chain for chain in chains if not set(sets[chain[-1]]).isdisjoint(keys)), None)
        if chain is None:
            chains.append([position])
        else:
            chain.append(position)
    return chains


def _cut(chains: Sequence[list[int]], size: int, sets: Sets) -> tuple[_Part, ...]:
    """Chains in pieces of at most `size` positions, as even as can be."""
    found = []
    for chain in chains:
        count = -(-len(chain) // size)
        ends = [len(chain) * number // count for number in range(count + 1)]
        for start, end in itertools.pairwise(ends):
            queries = tuple(chain[start:end])
            keys = tuple(sorted({key for query in queries for key in sets[query]}))
            found.append(_Part(queries, keys, tuple(tuple(key in sets[query] for key in keys) for query in queries)))
    return tuple(found)


def _matrix(sets: Sets, device: torch.device) -> torch.Tensor:
    """`(n, n)` bool."""
    return torch.tensor([[key in seen for key in range(len(sets))] for seen in map(set, sets)], device=device)
