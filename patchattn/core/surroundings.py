"""What is around a call of attention: what its module was called with, what came from further up, and its kv cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..cache.kept import KeptKeys
from ..cache.state import SequenceState, in_slots
from ..cache.tracked import TrackedLayer, sequence_state, track
from .layer_context import LayerContext as LayerContext
from .ranks import NOTHING_TOLD, Told
from .run import RESIDUAL, run_of
from .sites import AttentionSite


@dataclass(eq=False)
class Surroundings:
    """What is known around one call of attention.

    Attributes:
        module, site: the attention module and what is known of it.
        kwargs: what the attention function was called with besides tensors.
        query, key: as the attention function got them.
        layer: what the attention module was called with, for variants whose `needs_context` is true.
        rows: `(R,)` which of its queries the call is about; `None`: all.
        of_some_keys: whether the call is about some of its keys.
        is_apart: whether it is about the heads whose keys are apart, in a layer of their own (`set_apart`).
    """

    module: nn.Module
    site: AttentionSite
    kwargs: Mapping[str, Any]
    query: torch.Tensor
    key: torch.Tensor
    layer: LayerContext | None = None
    rows: torch.Tensor | None = None
    of_some_keys: bool = False
    is_apart: bool = False
    _own: tuple[Any, ...] = field(default=(), init=False)  # what `own_key` found

    def layer_input(self) -> torch.Tensor:
        """`(B, Tq, E)` the layer's input, row for row that of the queries; NotImplementedError if it is not."""
        return self._of_rows(self.module_call().tokens(self.query.shape[0], self.query.shape[2]), 1)

    def residual(self) -> torch.Tensor:
        """`(B, Tq, E)` what entered the layer, before its norm, without its gradient.

        For variants that hook their layer (`hooks.with_residual`); NotImplementedError if it did not arrive.
        """
        return self.handed_down(RESIDUAL, "what entered its layer")

    def handed_down(self, fact: str, meaning: str) -> torch.Tensor:
        """`(B, Tq, ...)` what a hook further up has handed down (`ModelRun.facts`) of the tokens of this call.

        Args:
            fact: its name.
            meaning: what it is, for the message.

        Raises:
            NotImplementedError: it did not arrive, or is of other tokens.
        """
        given, shape = run_of(self.kwargs).facts.get(fact), (self.query.shape[0], self.query.shape[2])
        if given is None or given.shape[:2] != shape:
            raise NotImplementedError(
                f"{self.site.module_class} ({self.site.name}) was not told {meaning}, for {shape[1]} tokens in a batch "
                f"of {shape[0]}: its layer does not hand keyword arguments on to it. Leave it out with modules=..."
            )
        return self._of_rows(given.to(self.query.device), 1)

    def raw_query(self) -> torch.Tensor:
        """`(B, H, Tq, D)` the query before its norm, where the family has one; the call's own query otherwise."""
        if self.site.query_norm is None:
            return self._of_rows(self.query, 2)
        raw = self.module_call().raw_query
        batch, heads, rows, _ = self.query.shape
        if raw is None or raw.numel() != self.query.numel():
            raise NotImplementedError(
                f"{self.site.module_class} ({self.site.name}) has a query norm ({self.site.query_norm}) whose input "
                "does not line up with its queries; this variant needs the query before that norm."
            )
        if raw.dim() == 4 and raw.shape[1:3] == (heads, rows) and (heads != rows or raw.stride(1) < raw.stride(2)):
            return self._of_rows(raw, 2)
        return self._of_rows(raw.reshape(batch, rows, heads, -1).transpose(1, 2), 2)

    def axis_of_keys(self) -> tuple[torch.Tensor | None, int | torch.Tensor | None, int | None]:
        """`columns`, `own_key`, and how many keys the kv cache let go of before its first; `None`: a layer slides."""
        layer = None if self.layer is None else self._cache_layer()
        if layer is None or self.site.is_cross:
            slides = layer is None and self.kwargs.get("sliding_window") and self.key.shape[2] != self.query.shape[2]
            self._own = (None,)
            return None, None, None if slides and not self.site.is_cross else 0
        columns = None if getattr(layer, "kept", None) is None else layer.columns()  # of one that is tracked
        seen, keys, rows = layer.get_seq_length(), self.key.shape[2], self.query.shape[2]
        own, dropped = keys - rows, max(0, int(seen) - keys)
        if not getattr(layer, "grows", False) and in_slots(layer):
            own, dropped = seen - rows, 0
        self._own = (own,)
        return columns, own, dropped

    def own_key(self) -> int | torch.Tensor | None:
        """Place of the first query's own key among the keys, where the layer of the kv cache is known."""
        return self._own[0] if self._own else self.axis_of_keys()[1]

    def columns(self) -> torch.Tensor | None:
        """`(B, 1 or Hkv, Tk)` as `TrackedLayer.columns`; `None` unless the kv cache has forgotten keys in between."""
        return self.axis_of_keys()[0]

    def has_empty(self) -> bool:
        """Whether some of `columns` are -1; true where that is not known on the host."""
        layer = self._cache_layer()
        return not isinstance(layer, TrackedLayer) or layer.has_empty

    def claim(self, owner: str) -> bool:
        """Be the only one who drops keys of the kv cache that this call writes to; false without a cache.

        Raises:
            NotImplementedError: as `keep`.
        """
        layer = self._own_layer(owner)
        if layer is not None:
            layer.claim(f"{owner} in {self.site.name}")
        return layer is not None

    def keep(
        self,
        owner: str,
        kept: torch.Tensor,
        *,
        bound: int | tuple[int, ...] | None = None,
        slack: int = 16,
        since: int = 0,
    ) -> None:
        """Have the kv cache forget the keys of this call that are not among `kept`; later calls do not see them.

        For variants whose `keeps_state` is true, once in a call, after attention. Without a cache there is nothing to
        forget.

        Args:
            owner: name of the variant.
            kept: `(B, 1 or Hkv, Tk)` bool.
            bound: the largest number of keys of a row among `kept`, without the last `since`: in all heads, or in each,
                and heads that keep fewer then take up less. `None`: likewise, and the device is asked.
            slack: how many tokens can be taken back exactly (assisted decoding), after which keys leave memory.
            since: so many tokens ago it was right already to drop them, as a rule on columns can say: they then leave
                memory also where every call's last tokens are taken back. The keys of these tokens stay.

        Raises:
            NotImplementedError: the cache or its layer cannot forget, something else depends on the keys that it holds,
                or two variants would drop keys.
            ValueError: a mask of another shape, a negative number, or more keys than `bound`.
        """
        layer, who = self._own_layer(owner), f"{owner} in {self.site.name}"
        if layer is not None:
            layer.keep(kept, owner=who, bound=bound, slack=slack, since=since)

    def hold_columns(self, owner: str, columns: torch.Tensor, seen: int) -> None:
        """Tell the kv cache, after attention, that this first call on it has stored the keys of some tokens alone.

        Args:
            owner: name of the variant.
            columns: `(B, S)` which of the `seen` tokens each key is of, ascending; -1 of empty slots, which come first.
            seen: how many there are.

        Raises:
            NotImplementedError: as `keep`.
        """
        layer = self._own_layer(owner)
        if layer is not None:
            layer.claim(f"{owner} in {self.site.name}")
            layer.kept = KeptKeys.of_columns(columns, seen)

    def set_apart(self, owner: str, kv_heads: Sequence[int]) -> None:
        """Have the kv cache keep the keys of some heads apart from now on, where other keys can be dropped.

        Every later call on this cache comes in two: of those heads (`is_apart`), and of the others. In a first call
        on it, after attention; without a cache there is nothing to set apart.

        Args:
            owner: name of the variant, which must be alone.
            kv_heads: their numbers.

        Raises:
            NotImplementedError: as `keep`.
            ValueError: they are not some of the heads, or heads are apart already.
        """
        layer = self._own_layer(owner)
        if layer is not None:
            layer.set_apart(kv_heads, owner=f"{owner} in {self.site.name}")

    def narrow(self, owner: str, channels: torch.Tensor, count: int, width: int) -> None:
        """Have the kv cache keep of its first `count` keys these channels alone; the others are zero from now on.

        For variants whose `keeps_state` is true, once on a cache, after attention; without a cache nothing is dropped.

        Args:
            owner: name of the variant.
            channels: `(B, Hkv, D')` int64.
            count: how many keys.
            width: channels of a key where it is attended to.

        Raises:
            NotImplementedError: as `keep`, or other heads or channels are stored.
            ValueError: something was dropped already, or there are not as many keys.
        """
        layer = self._own_layer(owner)
        if layer is not None:
            layer.narrow(channels, count, width, owner=f"{owner} in {self.site.name}")

    def _own_layer(self, owner: str) -> TrackedLayer | None:
        """The layer of the kv cache, for who drops keys of it; `None` without a cache."""
        layer = self._cache_layer()
        if self.layer is None or self.layer.cache is None:
            return None
        fault = None
        if self.site.is_cross or layer is None:
            fault = "keys of another sequence, or of another layer, are not its own to drop"
        elif self.of_some_keys or self.rows is not None:
            fault = "a variant outside of it hands on only some of the keys or queries: patch this one before that one"
        elif self.kwargs.get("position_bias") is not None:
            fault = "the model computes its position bias from the number of keys that the cache holds"
        elif self.site.inline:
            fault = "the module computes attention in its own code, which may count the keys that the cache holds"
        elif torch.compiler.is_compiling():
            fault = "the call is compiled"
        if fault is not None:
            raise NotImplementedError(f"{owner} in {self.site.name} cannot drop keys: {fault}.")
        return track(layer)

    def told(self) -> Told:
        """What the model was told of its tokens, as far as is known."""
        return NOTHING_TOLD if self.layer is None else self.layer.told

    def _cache_layer(self) -> Any:
        layer: Any = None if self.layer is None or self.layer.tap is None else self.layer.tap.layer
        return layer.apart[1] if self.is_apart else layer

    def sequence_state(self, owner: str, *, rewinds: bool = True, late: int | None = None) -> SequenceState | None:
        """What a variant remembers of these sequences, its `per_key` aligned with the keys of this call, new ones zero.

        It lives with the layer of the kv cache; `None` without a cache, or if the first call on it is compiled. For
        variants whose `keeps_state` is true, once in a call.

        Args:
            owner: name of the variant.
            rewinds: whether it stays right when the last tokens are taken out of the cache again; `crop` is refused
                otherwise.
            late: a call of at least so many tokens may be the first that is remembered of a cache that was filled
                without the variant; by default none may.

        Raises:
            ValueError: the cache was filled without this variant.
            NotImplementedError: the keys are in none of the cache's layers, or the call is about a part of them, or of
                the queries.
        """
        if self.of_some_keys or self.rows is not None:
            raise NotImplementedError(
                f"{owner!r} remembers something of every key and cannot run inside a variant that hands on only some "
                "of the keys or queries: patch it before that one."
            )
        layer_context = self.module_call()
        if layer_context.cache is None or layer_context.tap is None:
            return None
        layer, added = self._cache_layer(), layer_context.tap.added
        if layer is None:  # put there by an earlier call (cross attention), or by a layer that shares its keys
            layer, added = layer_context.tap.holder(self.key), 0 if self.site.is_cross else self.query.shape[2]
        if layer is None:
            raise NotImplementedError(
                f"{self.site.module_class} ({self.site.name}) takes its keys from no layer of its cache; a variant "
                "that keeps state along the sequence cannot follow them. Leave it out with modules=... or layers=..."
            )
        state = sequence_state(layer, f"{owner} in {self.site.name}", rows=added, rewinds=rewinds, late=late)
        if state is not None:
            state.align(layer, keys=self.key.shape[2], rows=added)
        return state

    def remembered(self, owner: str, now: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Facts of all keys, `(B, 1 or Hkv or H, Tk)`, from those of this call's tokens, which are remembered.

        Args:
            owner: name of the variant.
            now: `(B, Tq)`, or by head `(B, 1 or Hkv or H, Tq)`, by name.

        Raises:
            NotImplementedError: keys are not of these tokens, in cross attention; or as `sequence_state`.
        """
        if self.site.is_cross:
            raise NotImplementedError(
                f"{owner!r} says {', '.join(now)} of the queries of {self.site.name}, whose keys are of other tokens."
            )
        state, keys = self.sequence_state(owner), self.key.shape[2]
        by_head = {name: fact[:, None] if fact.dim() == 2 else fact for name, fact in now.items()}
        if state is None:
            return by_head
        own, rows = self.own_key(), self.query.shape[2]
        place = torch.arange(rows, device=self.key.device) + (0 if own is None else own)
        found = {}
        for name, fact in by_head.items():  # what is remembered has no gradient, but that of these tokens goes on
            past = state.per_key.get(name, fact.new_zeros(*fact.shape[:2], keys))
            found[name] = past.to(fact.dtype).index_copy(-1, place, fact)
            state.write(name, found[name], per_key=True)
        return found

    def module_call(self) -> LayerContext:
        """What the attention module was called with; RuntimeError if no hook of it ran."""
        if self.layer is None:
            raise RuntimeError(
                f"No layer context in {self.site.name}: the variant must say needs_context, and the module must be "
                "called as a module, so that its hooks run."
            )
        return self.layer

    def of_rows(self, rows: torch.Tensor) -> "Surroundings":
        """Those of some of the queries, `(R,)` of their numbers."""
        return replace(self, rows=rows if self.rows is None else self.rows[rows])

    def _of_rows(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor if self.rows is None else tensor.index_select(dim, self.rows)
