"""Attention sites: where a model attends, and with what geometry. The host of the model finds them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

ValueT = TypeVar("ValueT")

_SIZES = {
    "query_heads": "number of query heads",
    "kv_heads": "number of kv heads",
    "head_dim": "head dimension",
    "input_size": "input width",
    "memory_size": "width of what keys and values are made of",
}


@dataclass(frozen=True)
class HeadShard:
    """Which heads of an attention module this process holds, where several processes share them (tensor parallelism).

    They are as many in each process, and follow each other in the order of the processes.

    Attributes:
        rank, ranks: the process, counted from 0, and how many there are.
        query_heads, kv_heads: of the whole module.
    """

    rank: int
    ranks: int
    query_heads: int
    kv_heads: int

    def own(self, heads: Sequence[int], *, kv: bool = False) -> tuple[int, ...]:
        """Those of some query heads, or kv heads, that this process holds, counted from the first that it does."""
        count = (self.kv_heads if kv else self.query_heads) // self.ranks
        return tuple(head - self.rank * count for head in heads if head // count == self.rank)


@dataclass(frozen=True)
class AttentionSite:
    """One attention module of a model: plain data, without a reference to the module.

    Attributes:
        name: dotted path inside the model.
        tower: path of the stack of layers it belongs to (`""` for a bare decoder such as GPT2Model).
        layer_index: index of its layer inside the tower, counted from 0.
        layer_count: number of layers up to the last one of the tower that attends.
        module_class: class name of the module.
        is_cross: attends to another sequence than its own.
        query_heads, kv_heads, head_dim: geometry, `None` where tensors and configuration do not tell.
        input_size: width of the module's input, `None` where no projection is recognised.
        memory_size: width of what keys and values are made of; differs from `input_size` in some cross attention.
        projections: role (`query`, `key`, `value`, `fused`, `output`) to child name.
        projection_sizes: role to width of what that projection gives, for those (but `output`) that read the layer's
            input itself, or the other sequence of cross attention; the second half of a low-rank one does not.
        query_norm: child that normalises the query after its projection, `None` without one.
        input_argument: parameter of `forward` that holds the layer's input.
        memory_argument: parameter of `forward` that holds the other sequence of cross attention, if it has one.
        mask_argument: parameter of `forward` that holds the attention mask, if it has one.
        arguments: positional parameters of `forward`, in order.
        max_positions: length that the model was trained on by its configuration, before any rescaling of its rotary
            embedding, in tokens; `None` where it states none.
        inline: it computes attention in its own code, not by a function that is looked up by name.
        shares_keys: some modules of its class in its tower make no keys of their own, so that others lend them theirs.
        shard: which of its heads this process holds; `None`: all. A site that is found, and that settings are fitted
            to, tells the sizes of the whole module; the one that a variant is attached with those of this process.
        is_part: whether the sizes are those of the heads that this process holds, which are not all. It is asked in
            every call.
    """

    name: str
    tower: str
    layer_index: int
    layer_count: int
    module_class: str
    is_cross: bool
    query_heads: int | None
    kv_heads: int | None
    head_dim: int | None
    input_size: int | None
    memory_size: int | None
    projections: dict[str, str]
    projection_sizes: dict[str, int]
    query_norm: str | None
    input_argument: str
    memory_argument: str | None
    mask_argument: str | None
    arguments: tuple[str, ...]
    max_positions: int | None
    shares_keys: bool = False
    inline: bool = False
    shard: HeadShard | None = None
    is_part: bool = False

    def part(self) -> "AttentionSite":
        """The site as this process holds it; itself where that is all of it."""
        if self.shard is None or self.is_part:
            return self
        ranks = self.shard.ranks
        return replace(
            self,
            query_heads=self.shard.query_heads // ranks,
            kv_heads=self.shard.kv_heads // ranks,
            projection_sizes={role: size // ranks for role, size in self.projection_sizes.items()},
            is_part=ranks > 1,
        )

    def own_heads(self, heads: Sequence[int], *, kv: bool = False) -> tuple[int, ...]:
        """Of some heads of the whole module, those that this site is about, by their numbers here."""
        return self.shard.own(heads, kv=kv) if self.shard is not None and self.is_part else tuple(heads)

    def of_own_heads(self, values: Sequence[ValueT], *, kv: bool = False) -> list[ValueT]:
        """Of a value for each head of the whole module, those of the heads that this site is about."""
        return [value for head, value in enumerate(values) if self.own_heads([head], kv=kv)]

    @property
    def heads_in_all(self) -> tuple[int | None, int | None]:
        """Query heads and kv heads of the whole module."""
        shard = self.shard
        return (self.query_heads, self.kv_heads) if shard is None else (shard.query_heads, shard.kv_heads)

    def require(self, fact: str, *, by: str, instead: str | None = None) -> int:
        """A size that a variant cannot do without, such as `query_heads`.

        Args:
            fact: name of the attribute.
            by: who needs it, for the message.
            instead: what the user can do without it, likewise.

        Raises:
            NotImplementedError: neither the tensors nor the configuration of the model tell it.
        """
        value: int | None = getattr(self, fact)
        if value is None:
            advice = f"; {instead}" if instead else ""
            raise NotImplementedError(f"{by} cannot tell the {_SIZES[fact]} of {self.name}{advice}.")
        return value

    def geometry(self) -> dict[str, Any]:
        """What must agree for a patch made on another copy of the model to fit this one."""
        keep = ("head_dim", "input_size", "is_cross")
        heads = dict(zip(("query_heads", "kv_heads"), self.heads_in_all, strict=True))
        return {**heads, **{key: getattr(self, key) for key in keep}}
