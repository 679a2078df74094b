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
_GATHERING = 64  # to copy a key and its value into a tile takes as long as about so many products with them
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
        keys: `(G, K)` likewise.
        mask: `(G, Q, K)` bool: which of these keys each query sees; `None`: all.
    """

    queries: torch.Tensor
    keys: torch.Tensor
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


def tilings(seen: Sequence[Seen], order: torch.Tensor, prefix: int, heads: int) -> tuple[Tiling, ...] | None:
    """How to compute attention of one image in tiles; `None` where it would not be much less work.

    Args:
        seen: what its patches see, by heads.
        order: `(N,)` number of the token of each patch, row by row.
        prefix: how many first tokens see all, and are seen by all.
        heads: number of query heads.
    """
    parts = [(_parts(one.rows), _parts(one.columns)) for one in seen]
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
    return tuple(_tiling(one, *axes, order, prefix) for one, axes in zip(seen, parts, strict=True))


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
    query, key, value = (
        states.index_select(1, index.flatten()).unflatten(1, index.shape).flatten(0, 1).transpose(1, 2)
        for states, index in ((query, tile.queries), (key, tile.keys), (value, tile.keys))
    )
    if mask is not None:
        mask = mask.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return output.transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2)


def _tiling(
    seen: Seen, rows: tuple[_Part, ...], columns: tuple[_Part, ...], order: torch.Tensor, prefix: int
) -> Tiling:
    """Tiles of one size are computed together; the first ones are of the prefix, which sees all."""
    device, width = order.device, len(seen.columns)
    first = torch.arange(prefix, device=device)
    tiles = [Tile(first[None], torch.cat([first, order])[None], None)] if prefix else []
    sizes: dict[tuple[int, int], list[tuple[_Part, _Part]]] = {}
    for y in rows:
        for x in columns:
            sizes.setdefault((len(y.queries) * len(x.queries), len(y.keys) * len(x.keys)), []).append((y, x))
    for some in sizes.values():
        numbers = ([_product(getattr(y, of), getattr(x, of), width) for y, x in some] for of in ("queries", "keys"))
        queries, keys = (order[torch.tensor(each, device=device)] for each in numbers)
        keys = torch.cat([first.expand(len(keys), -1), keys], dim=1)
        mask = None
        if any(part.sees is not None for pair in some for part in pair):
            mask = F.pad(torch.stack([_sees(y, x, device) for y, x in some]), (prefix, 0), value=True)
        tiles.append(Tile(queries, keys, mask))
    done = torch.cat([tile.queries.flatten() for tile in tiles])
    # a query may be in its tile twice, to fill it: sorted stably, its first place comes first
    ordered, where = done.sort(stable=True)
    tokens = torch.arange(prefix + len(order), device=device)
    return Tiling(seen.heads, tuple(tiles), where[torch.searchsorted(ordered, tokens)])


def _product(rows: tuple[int, ...], columns: tuple[int, ...], width: int) -> list[int]:
    return [row * width + column for row in rows for column in columns]


def _sees(y: _Part, x: _Part, device: torch.device) -> torch.Tensor:
    """`(Q, K)` bool."""
    rows, columns = (
        torch.ones(len(part.queries), len(part.keys), dtype=torch.bool, device=device)
        if part.sees is None
        else torch.tensor(part.sees, device=device)
        for part in (y, x)
    )
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)


def _parts(sets: Sets) -> tuple[_Part, ...]:
    """Positions that see the same; or, where few do, neighbours whose keys overlap, filled up to one size."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for position, keys in enumerate(sets):
        alike.setdefault(keys, []).append(position)
    chains = _chains(sets)
    if 2 * len(alike) <= len(sets) or len(chains) == len(alike):
        return tuple(_Part(tuple(queries), keys, None) for keys, queries in alike.items())
    longest = max(map(len, chains))
    sizes = sorted({-(-longest // count) for count in range(1, min(longest, _MOST_CUTS) + 1)})
    cuts = [_cut(chains, size, sets) for size in sizes]
    work = [
        (len(cut) * max(len(keys) for _, keys in cut)) ** 2 * (size**2 + _GATHERING)
        for size, cut in zip(sizes, cuts, strict=True)
    ]
    cut = cuts[work.index(min(work))]
    most_queries, most_keys = (max(len(part[i]) for part in cut) for i in (0, 1))
    return tuple(_filled(queries, keys, sets, most_queries, most_keys) for queries, keys in cut)


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


def _cut(chains: Sequence[list[int]], size: int, sets: Sets) -> list[tuple[list[int], list[int]]]:
    """Chains in pieces of at most `size` positions, as even as can be; and the keys of each."""
    found = []
    for chain in chains:
        count = -(-len(chain) // size)
        ends = [len(chain) * number // count for number in range(count + 1)]
        for start, end in itertools.pairwise(ends):
            piece = chain[start:end]
            found.append((piece, sorted({key for query in piece for key in sets[query]})))
    return found


def _filled(queries: list[int], keys: list[int], sets: Sets, most_queries: int, most_keys: int) -> _Part:
    """The last query again, and keys that no query sees, up to as many as in the largest part."""
    others = [key for key in range(len(sets)) if key not in keys]
    filled = sorted(keys + others[: most_keys - len(keys)])
    rows = queries + [queries[-1]] * (most_queries - len(queries))
    return _Part(tuple(rows), tuple(filled), tuple(tuple(key in sets[row] for key in filled) for row in rows))


def _matrix(sets: Sets, device: torch.device) -> torch.Tensor:
    """`(n, n)` bool."""
    return torch.tensor([[key in seen for key in range(len(sets))] for seen in map(set, sets)], device=device)
