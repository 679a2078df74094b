"""Keys and values with spare places behind them, so that a token is appended without copying all those before it."""

import torch

_FEWEST, _MOST = 256, 1024  # spare places, in tokens
_WHOLE = 64  # long heads begin at multiples of so many tokens: whole pages of keys are then lines of one matrix


class Room:
    """Keys and values `(B, Hkv, S, D)` at the start of tensors with spare places behind them.

    No place is written twice: whoever holds what was handed out earlier keeps what it saw.

    Attributes:
        keys, values: those stored so far, views of the whole tensors.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, rows: int) -> None:
        """Copy keys and values, with places for `rows` more and some to spare."""
        self._stored = keys.shape[-2]
        spare = rows + min(max(self._stored // 8, _FEWEST), _MOST)
        if self._stored > 16 * _WHOLE:  # else it would take up too much beside what is stored
            spare += -(self._stored + spare) % _WHOLE
        self._keys, self._values = _extended(keys, values, spare)
        self.keys, self.values = (each.narrow(-2, 0, self._stored) for each in (self._keys, self._values))

    def goes_on(self, keys: torch.Tensor, values: torch.Tensor, rows: int) -> bool:
        """Whether `rows` more may be written behind these in the mode that torch is in, as they are what was handed out
        last, and not what somebody has put in their place."""
        is_own = self.keys is keys and self.values is values
        writable = torch.is_inference_mode_enabled() or not self._keys.is_inference()
        return is_own and writable and self._stored + rows <= self._keys.shape[-2]

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values `(B, Hkv, T, D)` behind those stored; all of them."""
        rows, before = keys.shape[-2], self._stored
        self._keys.narrow(-2, before, rows).copy_(keys)
        self._values.narrow(-2, before, rows).copy_(values)
        self._stored += rows
        self.keys, self.values = self._keys.narrow(-2, 0, self._stored), self._values.narrow(-2, 0, self._stored)
        return self.keys, self.values


def may_append(stored: tuple[torch.Tensor, torch.Tensor], new: tuple[torch.Tensor, torch.Tensor]) -> bool:
    """Whether new keys and values can be written behind those stored, and no gradient or graph would be harmed."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    keys, values = new
    return keys.shape[-2] == values.shape[-2] and _alike(stored[0], keys) and _alike(stored[1], values)


def _alike(stored: torch.Tensor, new: torch.Tensor) -> bool:
    if type(stored) is not torch.Tensor or type(new) is not torch.Tensor:
        return False
    is_placed_alike = stored.dtype == new.dtype and stored.device == new.device
    return is_placed_alike and new.shape[:-2] == stored.shape[:-2] and new.shape[-1] == stored.shape[-1]


def _extended(keys: torch.Tensor, values: torch.Tensor, spare: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies with spare places; in one piece of memory where they are alike, so that both are read at once."""
    *outer, stored, width = keys.shape
    if _alike(keys, values):
        whole = keys.new_empty(2, *outer, stored + spare, width)
        longer = whole[0], whole[1]
    else:
        longer = (
            keys.new_empty(*outer, stored + spare, width),
            values.new_empty(*values.shape[:-2], stored + spare, values.shape[-1]),
        )
    for copy, tensor in zip(longer, (keys, values), strict=True):
        copy.narrow(-2, 0, stored).copy_(tensor)
    return longer
