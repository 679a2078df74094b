"""The cache layer of a patched model: it carries what variants remember, may forget keys, and appends in place.

The layers of a cache are transformers' own. One that a variant needs to follow gets a subclass of its class, so that it
still is what it was to whoever asks; the cache that holds it stays as it is. All that happens to its sequences happens
here: growing, taking back, reordering, repeating, selecting, starting anew, moving between devices, copying.
"""

import copy
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Self

import torch
from transformers.cache_utils import DynamicLayer

from .compact import Narrow
from .kept import KeptKeys, checked_bounds
from .numbers import indices
from .state import SequenceState, holds_more, in_slots
from .stored import StoredLayer


class TrackedLayer(StoredLayer):
    """A layer of a kv cache with all that must follow its sequences; among its bases, the class it had comes next.

    Attributes:
        plain: the class it had.
        grows: whether it is a dynamic layer that keeps all keys. Only such a one can forget some, and appends in place.
        sequence_states: what variants remember, by owner.
        owner: who drops keys of this layer, if anybody does.
        kept: the keys that are left, once some were dropped; the last `crop` may have brought all back.
        is_expected: whether the next call comes from a model that knows that keys were forgotten.
        apart: kv heads whose keys are in another layer, as their number differs, and that layer.
    """

    plain: type
    sequence_states: dict[str, SequenceState]
    owner: str | None
    kept: KeptKeys | None
    is_expected: bool
    apart: "tuple[tuple[int, ...], TrackedLayer] | None"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.track()

    def track(self) -> None:
        """Start to carry what `plain` does not."""
        self.sequence_states = {}
        self.room = self.first = self.owner = self.kept = self.apart = None
        self.is_expected = False

    # What is stored

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append `(B, Hkv, T, D)`; all keys and values that are stored, without those of heads apart.

        Raises:
            NotImplementedError: keys were forgotten, and nobody is there to say so to attention.
        """
        if not self.is_expected and self.has_forgotten:
            raise NotImplementedError(
                f"{self.owner} has dropped keys of this kv cache, or parts of them, which a model without that patch "
                "would attend to wrongly. Start with a new cache."
            )
        self.is_expected = False
        if self.apart is not None:
            heads, other = self.apart
            rest = tuple(head for head in range(key_states.shape[1]) if head not in heads)
            theirs, own = (indices(some, key_states.device) for some in (heads, rest))
            other.is_expected = True
            other.update(key_states.index_select(1, theirs), value_states.index_select(1, theirs), *args, **kwargs)
            key_states, value_states = key_states.index_select(1, own), value_states.index_select(1, own)
        held = self.append(key_states, value_states, *args, **kwargs)
        if self.kept is not None:
            self.kept.append(key_states.shape[-2])
        return held

    def get_seq_length(self) -> Any:
        """How many tokens it was given: also those that it has forgotten count."""
        if self.kept is not None:
            return self.kept.seen
        if self.grows and self.first is None and self.is_initialized and self.keys.dim() == 4:  # the same, at less cost
            return self.keys.shape[-2]
        return super().get_seq_length() if self.first is None else self.stored

    @property
    def has_forgotten(self) -> bool:
        """Whether only a model that knows of it may go on."""
        return self.kept is not None or self.apart is not None or self.first is not None

    def columns(self) -> torch.Tensor | None:
        """`(B, 1 or Hkv, S)` int64: which of the tokens ever given each stored key is of, ascending.

        -1 where the key is hidden or a slot empty; size 1 says the same in all heads; `None` that key j is of token j.
        """
        return None if self.kept is None else self.kept.seen_columns()

    @property
    def has_empty(self) -> bool:
        """Whether some of `columns` are -1; true where that is not known on the host."""
        return self.kept is not None and (self.kept.has_empty or self.kept.dropped is not None)

    # What is forgotten

    def keep(
        self,
        kept: torch.Tensor,
        *,
        owner: str,
        bound: int | tuple[int, ...] | None = None,
        slack: int = 16,
        since: int = 0,
    ) -> None:
        """Drop the stored keys that are not among `kept`.

        They are hidden at once, and leave storage when `slack` more tokens have come. Until then `crop` brings back
        what the tokens that it takes back have dropped; what it cannot bring back it refuses.

        Args:
            kept: `(B, 1 or Hkv, S)` bool, over the keys that are stored; what is hidden already stays so.
            owner: who decides. Only one may do so in a layer.
            bound: the largest number of keys of a row among `kept`, without the last `since`: in all heads, or in each,
                and heads that keep fewer then take up less. `None`: likewise, and the device is asked.
            slack: number of tokens that can always be taken back.
            since: so many tokens ago it was right already to drop them, so that taking back no more brings none back:
                of rules on columns, not of scores. The keys of these tokens stay.

        Raises:
            NotImplementedError: as `claim`.
            ValueError: a mask of another shape, a negative number, or more keys than `bound`.
        """
        self.claim(owner)
        (batch, heads), stored = self.keys.shape[:2], self.stored
        bounds = checked_bounds(kept, (batch, heads, stored), owner, bound, slack, since)
        self.kept = KeptKeys(stored, batch, kept.device) if self.kept is None else self.kept
        self.kept.drop(kept.to(self.kept.columns.device), bounds, since)
        shrunk = self.kept.shrink(slack)
        if shrunk is None:
            return
        for state in self.sequence_states.values():
            state.gather(shrunk.places)
        self.gather(shrunk.places)
        if shrunk.total is not None:
            newest = self.kept.seen - self.kept.carried_out
            self.hold_by_length(self.kept.columns >= 0, newest, shrunk.total - heads * newest)

    def set_apart(self, heads: Sequence[int], *, owner: str) -> "TrackedLayer":
        """Keep the keys of some kv heads in a layer of their own, which may forget others than this one.

        Raises:
            NotImplementedError: as `keep`.
            ValueError: they are not some of the heads, or heads are apart already.
        """
        self.claim(owner)
        count = self.keys.shape[1]
        chosen = tuple(sorted(set(heads)))
        if not chosen or not set(chosen) < set(range(count)) or self.apart is not None or self.kept is not None:
            raise ValueError(
                f"{owner}: some of {count} kv heads, none of which has forgotten a key, can be set apart once; got "
                f"{list(heads)}, where {'some' if self.apart or self.kept else 'none'} are or have."
            )
        rest = [head for head in range(count) if head not in chosen]
        other: Any = tracked(DynamicLayer)()
        other.update(self.keys[:, chosen], self.values[:, chosen])
        other.claim(owner)
        self.keys, self.values, self.room = self.keys[:, rest], self.values[:, rest], None
        self.apart = chosen, other
        return self.apart[1]

    def narrow(self, channels: torch.Tensor, count: int, width: int, *, owner: str) -> None:
        """Keep of the first `count` keys these channels `(B, Hkv, D')` of `width` alone; the others are zero.

        Raises:
            NotImplementedError: as `keep`, or other heads or channels are stored than attended to.
            ValueError: keys or channels were dropped already, or there are not as many keys.
        """
        self.claim(owner)
        if self.has_forgotten or not 0 < count <= self.stored:
            raise ValueError(f"{owner}: channels of 1 to {self.stored} keys can be dropped, once; got {count} keys.")
        self.hold_first(Narrow.of(self.keys[:, :, :count], self.values[:, :, :count], channels, width, owner))

    def claim(self, owner: str) -> None:
        """Be the only one who drops keys of this layer.

        Raises:
            NotImplementedError: this layer cannot forget, another one drops its keys already, or a variant remembers
                something of every key.
        """
        if not self.grows:
            raise NotImplementedError(
                f"{owner} drops keys, or parts of them, which {self.plain.__name__} cannot follow: use a dynamic kv "
                "cache, not a static or quantised one, and leave out layers with a sliding window (layers=...), which "
                "forget by themselves."
            )
        if holds_more(self):
            plain, more = self.plain.__name__, "holds more of every token than its key and value, which would stay"
            raise NotImplementedError(f"{owner} cannot drop keys: {plain} {more}.")
        if self.owner not in (None, owner):
            raise NotImplementedError(
                f"{owner} was to drop keys of a kv cache from which {self.owner} drops some already: only one may do "
                "so in a layer. Patch with one of them, and start with a new cache."
            )
        for name, state in self.sequence_states.items():
            if name != owner and (state.per_key or state.earlier):
                raise NotImplementedError(
                    f"{state.owner} remembers something of every key and cannot go on where {owner} drops keys: patch "
                    "with one of them."
                )
        if not self.is_initialized:
            raise ValueError(f"{owner} was to drop keys of a kv cache that has none yet.")
        self.owner = owner

    # What happens to its sequences

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.change_first(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))
        for each in self._followers():
            each.select(beam_idx)
        if self.apart is not None:
            self.apart[1].reorder_cache(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.change_first(lambda tensor: tensor[indices.to(tensor.device)])
        for each in self._followers():
            each.select(indices)
        if self.apart is not None:
            self.apart[1].batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.change_first(lambda tensor: tensor.repeat_interleave(repeats, dim=0))
        for each in self._followers():
            each.repeat(repeats)
        if self.apart is not None:
            self.apart[1].batch_repeat_interleave(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens.

        Raises:
            NotImplementedError: something that they have changed cannot be undone.
        """
        # older versions of transformers take a positive number for the length to keep
        length = self.get_seq_length()
        left = tokens_to_remove if tokens_to_remove > 0 else length + tokens_to_remove
        removed = int(max(0, length - max(0, left)))  # a tensor where assisted decoding counted it
        self._refuse_crop(removed)
        super().crop(tokens_to_remove)
        if removed:
            self.room = None  # its places behind those left are written
        if removed and self.kept is not None:
            self.kept.crop(removed)
        for state in self.sequence_states.values():
            state.crop(self, removed)
        if self.apart is not None:
            self.apart[1].crop(-removed)

    def _refuse_crop(self, removed: int) -> None:
        for state in self.sequence_states.values():
            if state.settled is not None:
                raise NotImplementedError(f"{state.owner} {state.settled}")
            if removed and not state.rewinds:
                raise NotImplementedError(
                    f"{state.owner} keeps sums over all tokens so far and cannot take back the last {removed} of them: "
                    "no cropped cache, and so no assisted decoding, under this variant."
                )
            if removed and getattr(self, "is_compileable", False) and not in_slots(self):
                raise NotImplementedError(
                    f"{state.owner} cannot take back the last {removed} tokens of a static sliding cache that is full: "
                    "what they have pushed out of its window is lost. Use a dynamic one."
                )
        if self.kept is not None and not self.kept.can_crop(removed):
            raise NotImplementedError(
                f"{self.owner} cannot take back the last {removed} tokens: it has forgotten keys since "
                f"{self.kept.carried_out} tokens were there, and {self.kept.seen} are now."
            )
        if self.first is not None and removed > self.keys.shape[2]:
            raise NotImplementedError(
                f"{self.owner} cannot take back the last {removed} tokens: it has dropped parts of the keys of all but "
                f"the last {self.keys.shape[2]}."
            )
        if self.apart is not None:
            self.apart[1]._refuse_crop(removed)

    def reset(self) -> None:
        if self.grows:  # not zeroed: whoever was handed keys keeps them
            self.keys, self.values, self.is_initialized = None, None, False
        super().reset()
        self.track()

    def offload(self) -> None:
        super().offload()
        self.change_first(lambda tensor: tensor.to("cpu", non_blocking=True))
        if self.apart is not None:
            self.apart[1].offload()

    def prefetch(self) -> None:
        super().prefetch()
        if self.first is not None:
            self.change_first(lambda tensor: tensor.to(self.keys.device, non_blocking=True))
        if self.apart is not None:
            self.apart[1].prefetch()

    def _followers(self) -> "Iterable[SequenceState | KeptKeys]":
        return [*self.sequence_states.values(), *([] if self.kept is None else [self.kept])]

    # Copies

    def __copy__(self) -> Self:
        """One that goes on by itself; what is stored so far is shared, which a growing layer never writes to."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, room=None)
        twin.sequence_states = {owner: state.fork() for owner, state in self.sequence_states.items()}
        twin.kept = None if self.kept is None else self.kept.fork()
        twin.apart = None if self.apart is None else (self.apart[0], copy.copy(self.apart[1]))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:  # a class made here cannot be found by its name
        twin = copy.copy(self)
        if self.room is not None:  # a view would drag the spare places along
            twin.keys, twin.values = self.keys.clone(), self.values.clone()
        return _restore, (self.plain, twin.__dict__)

    def held(self) -> list[torch.Tensor]:
        """All tensors that are there for this layer."""
        tensors = [tensor for tensor in vars(self).values() if isinstance(tensor, torch.Tensor)]
        tensors += [tensor for state in self.sequence_states.values() for tensor in state.held()]
        tensors += [] if self.kept is None else self.kept.tensors()
        tensors += [] if self.room is None else [self.room.keys, self.room.values]
        tensors += [] if self.first is None else self.first.held()
        return tensors + ([] if self.apart is None else self.apart[1].held())


@cache
def tracked(plain: Any) -> type[TrackedLayer]:
    """The class of a layer whose class is `plain` so far."""
    grows = issubclass(plain, DynamicLayer) and all(
        getattr(plain, name) is getattr(DynamicLayer, name) for name in ("update", "get_seq_length", "get_mask_sizes")
    )
    # transformers would register a subclass that inherits a layer type
    own = {"plain": plain, "grows": grows, "_layer_type": None}
    return type(f"Tracked{plain.__name__}", (TrackedLayer, plain), own)


def track(layer: Any) -> TrackedLayer:
    """Have a layer of a cache follow its sequences; the same object."""
    if not isinstance(layer, TrackedLayer):
        plain: Any = type(layer)
        layer.__class__ = tracked(plain)
        layer.track()
    return layer


def sequence_state(
    layer: Any, owner: str, *, rows: int, rewinds: bool, late: int | None = None
) -> SequenceState | None:
    """The state of `owner` on a cache layer that has just been given `rows` tokens; a new one from an empty cache.

    `None` in the first call on a cache if that call is compiled: what follows on that cache is then refused. `late`
    tokens at once may be the first that a new state knows of; without that number, all must be.

    Raises:
        ValueError: there is none, but the layer held tokens before these.
        NotImplementedError: a compiled call on a static cache without one, which cannot tell.
    """
    states: dict[str, SequenceState] = getattr(layer, "sequence_states", {})  # of a layer that is tracked
    if owner in states:
        return states[owner]
    if torch.compiler.is_compiling() and in_slots(layer):
        raise NotImplementedError(
            f"{owner} must see the first call on a static cache uncompiled, as `generate` does it; compile the others."
        )
    if (late is None or rows < late) and int(layer.get_seq_length()) > rows:
        needed = "" if late is None else f" Give it at least the last {late} tokens of the prompt in one call."
        raise ValueError(
            f"{owner} was to continue {int(layer.get_seq_length()) - rows} cached tokens but knows of none: the cache "
            f"was filled without it.{needed}"
        )
    if torch.compiler.is_compiling():
        return None
    layer = track(layer)
    new = layer.sequence_states[owner] = SequenceState(owner, rewinds, layer.grows, in_slots(layer))
    return new


def only_holds(layer: Any) -> bool:
    """Whether all that a layer is, is the keys and values of all its tokens: to be gone on with by another one."""
    if not isinstance(layer, TrackedLayer):
        return type(layer) is DynamicLayer
    return layer.plain is DynamicLayer and not layer.has_forgotten and not layer.sequence_states


def _restore(plain: type, attributes: dict[str, Any]) -> Any:
    layer = object.__new__(tracked(plain))
    layer.__dict__.update(attributes)
    return layer
