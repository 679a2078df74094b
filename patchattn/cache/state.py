"""State along a sequence: what a variant remembers of earlier tokens lives with the layer of the kv cache they are in.

It must follow that layer through beam reordering, repetition and selection of sequences, cropping and reset, so the
layer object itself carries it: the first state put on it turns its class into a subclass that hands those five calls
on. Nothing is kept on modules.
"""

from functools import cache
from typing import Any

import torch


class SequenceState:
    """What one variant on one attention module remembers of the sequences in one cache layer.

    Attributes:
        owner: who remembers, for messages.
        rewinds: whether it stays right when the last tokens are taken back (`crop`): true of facts about keys, not of
            sums over the rows so far.
        tensors: by name, `(B, ...)`.
        per_key: by name, `(B, ..., Tk)`, one entry per key of the last call.
        earlier: by name, `(B, ..., n)`, those of keys before them that the layer still holds, to take tokens back.
    """

    def __init__(self, owner: str, rewinds: bool) -> None:
        self.owner = owner
        self.rewinds = rewinds
        self.tensors: dict[str, torch.Tensor] = {}
        self.per_key: dict[str, torch.Tensor] = {}
        self.earlier: dict[str, torch.Tensor] = {}

    def write(self, name: str, tensor: torch.Tensor, *, per_key: bool = False) -> None:
        """Remember `(B, ...)`, or `(B, ..., Tk)` aligned with the keys of the call; without its gradient, and no
        view of what is in the cache."""
        place = self.per_key if per_key else self.tensors
        place[name] = tensor.detach()

    def align(self, layer: Any, keys: int, rows: int) -> None:
        """Bring `per_key` to the keys of a call, which `layer` has just added `rows` to; those start at zero.

        Raises:
            ValueError: the layer holds tokens that this state knows nothing of.
        """
        if in_slots(layer):
            return
        needed, held = keys - rows, getattr(layer, "keys", None)
        spare = 0 if held is None else max(0, held.shape[-2] - keys)
        for name, tensor in self.per_key.items():
            past = self._known(name, tensor)[..., : layer.get_seq_length() - rows]  # no slots that were not filled then
            if past.shape[-1] < needed:
                raise ValueError(
                    f"{self.owner} was to continue {needed} cached tokens but knows of {past.shape[-1]}: the cache "
                    "was filled without it."
                )
            before, past = past.tensor_split([past.shape[-1] - needed], dim=-1)
            if spare:
                self.earlier[name] = before[..., -spare:]
            self.per_key[name] = torch.cat([past, past.new_zeros(*past.shape[:-1], rows)], dim=-1)

    def select(self, indices: torch.Tensor) -> None:
        """Keep these sequences, in this order."""
        for place in (self.tensors, self.per_key, self.earlier):
            for name, tensor in place.items():
                place[name] = tensor[indices.to(tensor.device)]

    def repeat(self, repeats: int) -> None:
        """Repeat every sequence."""
        for place in (self.tensors, self.per_key, self.earlier):
            for name, tensor in place.items():
                place[name] = tensor.repeat_interleave(repeats, dim=0)

    def crop(self, layer: Any, removed: int) -> None:
        """Forget the last `removed` keys, which `layer` has just done."""
        for name, tensor in self.per_key.items():
            if in_slots(layer):
                is_filled = torch.arange(tensor.shape[-1], device=tensor.device) < layer.get_seq_length()
                self.per_key[name] = tensor.masked_fill(~is_filled, 0)
            else:
                known = self._known(name, tensor)
                self.per_key[name] = known[..., : known.shape[-1] - removed]

    def _known(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The entries of the last call's keys, behind those of earlier ones, which are no longer kept apart."""
        before = self.earlier.pop(name, None)
        return tensor if before is None else torch.cat([before, tensor], dim=-1)


def in_slots(layer: Any) -> bool:
    """Whether a cache layer gives every key in a slot of its own, counted from the first; else the last key is last.

    A static layer does, until a sliding one among them is full and starts to shift.
    """
    static = getattr(layer, "is_compileable", False)
    return static and not (layer.is_sliding and layer.get_seq_length() > layer.max_cache_len)


def sequence_state(layer: Any, owner: str, *, rows: int, rewinds: bool) -> SequenceState | None:
    """The state of `owner` on a cache layer that has just been given `rows` tokens; a new one from an empty cache.

    `None` in the first call on a cache if that call is compiled: what follows on that cache is then refused.

    Raises:
        ValueError: there is none, but the layer held tokens before these.
        NotImplementedError: a compiled call on a static cache without one, which cannot tell.
    """
    states = getattr(layer, "sequence_states", None)
    if states is not None and owner in states:
        found: SequenceState = states[owner]
        return found
    if torch.compiler.is_compiling() and in_slots(layer):
        raise NotImplementedError(
            f"{owner} must see the first call on a static cache uncompiled, as `generate` does it; compile the others."
        )
    if int(layer.get_seq_length()) > rows:
        raise ValueError(
            f"{owner} was to continue {int(layer.get_seq_length()) - rows} cached tokens but knows of none: the cache "
            "was filled without it."
        )
    if torch.compiler.is_compiling():
        return None
    if states is None:
        plain: type = type(layer)
        layer.__class__ = _stateful(plain)
        layer.sequence_states = states = {}
    states[owner] = SequenceState(owner, rewinds)
    new: SequenceState = states[owner]
    return new


@cache
def _stateful(plain: Any) -> type:
    """A cache layer's class, with its calls on sequences handed on to the states it carries."""

    class Stateful(plain):
        _layer_type = None  # transformers would register a subclass that inherits one
        sequence_states: dict[str, SequenceState]

        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            super().reorder_cache(beam_idx)
            for state in self.sequence_states.values():
                state.select(beam_idx)

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            super().batch_select_indices(indices)
            for state in self.sequence_states.values():
                state.select(indices)

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            for state in self.sequence_states.values():
                state.repeat(repeats)

        def crop(self, tokens_to_remove: int) -> None:
            # older versions of transformers take a positive number for the length to keep
            kept = tokens_to_remove if tokens_to_remove > 0 else self.get_seq_length() + tokens_to_remove
            removed = max(0, self.get_seq_length() - kept)
            for state in self.sequence_states.values():
                if removed and not state.rewinds:
                    raise NotImplementedError(
                        f"{state.owner} keeps sums over all tokens so far and cannot take back the last {removed} of "
                        "them: no cropped cache, and so no assisted decoding, under this variant."
                    )
                if removed and getattr(self, "is_compileable", False) and not in_slots(self):
                    raise NotImplementedError(
                        f"{state.owner} cannot take back the last {removed} tokens of a static sliding cache that is "
                        "full: what they have pushed out of its window is lost. Use a dynamic one."
                    )
            super().crop(tokens_to_remove)
            for state in self.sequence_states.values():
                state.crop(self, removed)

        def reset(self) -> None:
            super().reset()
            self.sequence_states.clear()

        def __reduce_ex__(self, protocol: Any) -> Any:  # a class made here cannot be found by its name
            return _restore, (plain, self.__dict__.copy())

    Stateful.__name__ = Stateful.__qualname__ = f"Stateful{plain.__name__}"
    return Stateful


def _restore(plain: type, attributes: dict[str, Any]) -> Any:
    layer: Any = object.__new__(_stateful(plain))
    layer.__dict__.update(attributes)
    return layer
