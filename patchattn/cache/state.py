"""State along a sequence: what a variant remembers of earlier tokens lives with the layer of the kv cache they are in.

It must follow that layer through beam reordering, repetition and selection of sequences, cropping and reset, so the
layer object itself carries it (`tracked.py`). Nothing is kept on modules.
"""

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F

# Of `(B, Hkv, p * block, D)`, keys of p whole pages, and of the places that they have among all keys of the call, their
# facts `(B, Hkv, p, ...)`.
Make = Callable[[torch.Tensor, slice | torch.Tensor], torch.Tensor]


class SequenceState:
    """What one variant on one attention module remembers of the sequences in one cache layer.

    Attributes:
        owner: who remembers, for messages.
        rewinds: whether it stays right when the last tokens are taken back (`crop`): true of facts about keys, not of
            sums over the rows so far.
        settled: why not even a `crop` of nothing may come, which assisted decoding makes after every call; or `None`.
        grows: whether the layer keeps every key at the place it came to, behind the earlier ones.
        in_slots: whether every key has a slot of its own, some of which are not filled yet, as in a static layer.
        tensors: by name, `(B, ...)`.
        per_key: by name, `(B, h, Tk)`, one entry per key of the last call; h is 1, Hkv, H or a number of chosen heads.
        earlier: by name, `(B, h, n)`, those of keys before them that the layer still holds, to take tokens back.
        pages: by name, their length in keys and `(B, Hkv, P, ...)` of `blocks`.
    """

    def __init__(self, owner: str, rewinds: bool, grows: bool = False, in_slots: bool = False) -> None:
        self.owner = owner
        self.rewinds = rewinds
        self.settled: str | None = None
        self.grows = grows
        self.in_slots = in_slots
        self.tensors: dict[str, torch.Tensor] = {}
        self.per_key: dict[str, torch.Tensor] = {}
        self.earlier: dict[str, torch.Tensor] = {}
        self.pages: dict[str, tuple[int, torch.Tensor]] = {}
        self._asked: tuple[str, ...] = ()  # pages in slots that were asked for in this call
        self._asked_before: tuple[str, ...] = ()  # and in the one before

    def begin_call(self) -> None:
        """To be asked in every call by who asks for `blocks_in_slots` in some of them."""
        self._asked_before, self._asked = self._asked, ()

    def write(self, name: str, tensor: torch.Tensor, *, per_key: bool = False) -> None:
        """Remember `(B, ...)`, or `(B, h, Tk)` aligned with the keys of the call; without its gradient, and no view of
        what is in the cache.

        Raises:
            ValueError: of keys, and without a dimension of heads.
        """
        if per_key and tensor.dim() != 3:
            raise ValueError(
                f"{self.owner} was to remember {name!r} of every key as (B, h, Tk), got the shape {(*tensor.shape,)}: "
                "what is alike in all heads has an h of 1."
            )
        place = self.per_key if per_key else self.tensors
        place[name] = tensor.detach() if tensor.requires_grad else tensor

    def blocks(self, name: str, block: int, keys: torch.Tensor, make: Make) -> torch.Tensor | None:
        """Facts of complete pages of keys, each made once: `(B, Hkv, P, ...)` of the P = Tk // block pages of a call.

        Args:
            name: of these facts.
            block: length of a page, in keys.
            keys: `(B, Hkv, Tk, D)` all keys of the call.
            make: of `(B, Hkv, p * block, D)`, keys of p whole pages, their facts `(B, Hkv, p, ...)`; it is also told by
                a slice, or by numbers, where they are among all keys.

        Returns:
            `None` as long as no page is complete.

        Raises:
            ValueError: they were made of other pages, or `make` gives other than one fact a page.
            NotImplementedError: the cache gives no key a lasting place.
        """
        if not self.grows:
            raise NotImplementedError(
                f"{self.owner} reads keys by pages, and in a static or sliding kv cache these do not stay what they "
                "are: use a dynamic cache, and leave sliding layers out with layers=..."
            )
        length, known = self.pages.get(name, (block, keys[:, :, :0, :0]))
        complete = keys.shape[2] // block
        have = known.shape[2]
        if length != block or have > complete:
            raise ValueError(
                f"{self.owner} knows {name!r} of {have} pages of {length} keys, got {complete} pages of {block}."
            )
        if have < complete:
            part = slice(have * block, complete * block)
            new = make(keys[:, :, part], part).detach()
            if new.shape[2] != complete - have:
                raise ValueError(f"{name!r} of {complete - have} pages were expected, got {new.shape[2]}.")
            known = torch.cat([known, new], dim=2) if have else new
            self.pages[name] = block, known
        return known if complete else None

    def blocks_in_slots(
        self,
        name: str,
        block: int,
        keys: torch.Tensor,
        make: Make,
        *,
        first: int | torch.Tensor | None,
        rows: int,
    ) -> torch.Tensor:
        """The same where each key has a slot: of P pages, those with slots that are not filled yet included.

        A single token has the page made anew that it is in, if these facts were asked for in the call before; else all
        are made.

        Args:
            name: as of `blocks`.
            block: likewise.
            keys: likewise.
            make: likewise.
            first: the slot of the first key that is new in this call; `None`: not known.
            rows: how many are new.
        """
        complete = keys.shape[2] // block
        length, known = self.pages.get(name, (block, keys[:, :, :0, :0]))
        if rows == 1 and first is not None and name in self._asked_before and length == block and complete:
            number = torch.as_tensor(first, device=keys.device).flatten()[:1] // block
            number = number.clamp(max=complete - 1)
            slots = number * block + torch.arange(block, device=keys.device)
            known = known.index_copy(2, number, make(keys.index_select(2, slots), slots).detach())
        else:
            part = slice(0, complete * block)
            known = make(keys[:, :, part], part).detach()
        self.pages[name] = block, known
        self._asked = (*self._asked, name)
        return known

    def align(self, layer: Any, keys: int, rows: int) -> None:
        """Bring `per_key` to the keys of a call, which `layer` has just added `rows` to; those start at zero.

        Raises:
            ValueError: the layer holds tokens that this state knows nothing of.
            NotImplementedError: the layer keeps its keys elsewhere than others do.
        """
        if not self.grows and in_slots(layer):
            return
        needed, held = keys - rows, getattr(layer, "keys", None)
        if held is not None and held.dim() < 2:  # still empty behind a call: which keys it drops is not known
            raise NotImplementedError(
                f"{self.owner} follows the keys of a cache, and {type(layer).__name__} keeps {keys} of them in a place "
                "of its own. Leave these modules out with modules=... or layers=..., or call the model with "
                "use_cache=False."
            )
        spare = 0 if held is None else max(0, held.shape[-2] - keys)
        for name, tensor in self.per_key.items():
            past, seen = self._known(name, tensor), layer.get_seq_length() - rows
            if past.shape[-1] > seen:  # slots that were not filled then
                past = past[..., :seen]
            count = past.shape[-1]
            if count < needed:
                raise ValueError(
                    f"{self.owner} was to continue {needed} cached tokens but knows of {count}: the cache was filled "
                    "without it."
                )
            if spare:
                self.earlier[name] = past[..., max(0, count - needed - spare) : count - needed]
            self.per_key[name] = F.pad(past[..., count - needed :] if count > needed else past, (0, rows))

    def select(self, indices: torch.Tensor) -> None:
        """Keep these sequences, in this order."""
        self._change(lambda tensor: tensor[indices.to(tensor.device)])

    def repeat(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def crop(self, layer: Any, removed: int) -> None:
        """Forget the last `removed` keys, which `layer` has just done."""
        for name, tensor in self.per_key.items():
            if in_slots(layer):
                is_filled = torch.arange(tensor.shape[-1], device=tensor.device) < layer.get_seq_length()
                self.per_key[name] = tensor.masked_fill(~is_filled, 0)
            else:
                known = self._known(name, tensor)
                self.per_key[name] = known[..., : known.shape[-1] - removed]
        for name, (block, facts) in self.pages.items():
            self.pages[name] = block, facts[:, :, : layer.stored // block]

    def gather(self, places: torch.Tensor) -> None:
        """Only the keys in these places `(B, 1 or Hkv, S)` are left, in this order; no page is what it was."""
        for name, tensor in self.per_key.items():
            heads = max(tensor.shape[1], places.shape[1])
            of_heads = places.repeat_interleave(heads // places.shape[1], dim=1).to(tensor.device)
            self.per_key[name] = tensor.expand(-1, heads, -1).gather(-1, of_heads)
        self.pages.clear()

    def fork(self) -> Self:
        """One that goes on by itself; tensors are shared, for none is written to."""
        twin = copy.copy(self)
        for place in ("tensors", "per_key", "earlier", "pages"):
            setattr(twin, place, dict(getattr(self, place)))
        return twin

    def held(self) -> list[torch.Tensor]:
        """All tensors that are remembered."""
        places = (self.tensors, self.per_key, self.earlier)
        return [
            *(tensor for place in places for tensor in place.values()),
            *(facts for _, facts in self.pages.values()),
        ]

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for place in (self.tensors, self.per_key, self.earlier):
            for name, tensor in place.items():
                place[name] = change(tensor)
        for name, (block, facts) in self.pages.items():
            self.pages[name] = block, change(facts)

    def _known(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The entries of the last call's keys, behind those of earlier ones, which are no longer kept apart."""
        before = self.earlier.pop(name, None)
        return tensor if before is None else torch.cat([before, tensor], dim=-1)


def holds_more(layer: Any) -> bool:
    """Whether a layer of a kv cache holds tensors of tokens beside keys and values, such as those of an indexer."""
    own = {name: value for name, value in vars(layer).items() if name not in ("keys", "values")}
    return any(isinstance(value, torch.Tensor) and value.dim() > 2 for value in own.values())


def in_slots(layer: Any) -> bool:
    """Whether a cache layer gives every key in a slot of its own, counted from the first; else the last key is last.

    A static layer does, until a sliding one among them is full and starts to shift.
    """
    static = getattr(layer, "is_compileable", False)
    return static and not (layer.is_sliding and layer.get_seq_length() > layer.max_cache_len)
