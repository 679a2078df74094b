"""Rows that read rows before them: weights that depend on the logits of earlier tokens, too."""

from dataclasses import dataclass

import torch

from ..cache.state import SequenceState
from ..core import ranks
from ..core.call import AttentionCall
from ..core.variant import Attend, AttentionOutput, Variant
from .rows import HIDDEN, capped_logits, in_chunks, rows_at_once, weighted_values

_QUERIES, _TERMS = "queries", "terms"


class EarlierRowsVariant(Variant):
    """A variant whose weights of a row come from the logits of this row and of those of some tokens before it.

    Along a sequence it remembers the queries of so many last tokens, and by key what is added to their logits. Rows and
    keys come in the order of the text, padding in front of it wherever it was. Register it as `innermost`, without
    `sinks`, and for causal self-attention alone.
    """

    @property
    def reach(self) -> int:
        """How many rows before it a row's weights depend on."""
        raise NotImplementedError(f"{type(self).__name__} must define reach.")

    def weights(self, logits: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Weights `(B, H, R, Tk)` of R rows; of the first `reach` they may be anything finite.

        Args:
            logits: `(B, H, R, Tk)` float32 or wider, scaled, capped and with biases; of hidden keys finite and as low
                as can be.
            visible: `(B or 1, H or 1, R, Tk)` bool. Before a text begins there are rows that see nothing. What hidden
                keys are given does not matter.
        """
        raise NotImplementedError(f"{type(self).__name__} must define weights(logits, visible).")

    @property
    def needs_context(self) -> bool:
        return True

    @property
    def keeps_state(self) -> bool:
        return True

    def attend(self, call: AttentionCall, inner: Attend) -> AttentionOutput:
        reach, count = self.reach, call.query.shape[2]
        state = call.context.sequence_state(type(self).__name__, rewinds=False)
        text = _Text.of(call, reach, state)

        def of(start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
            logits, visible = text.logits(start, end + reach)
            weights = self.weights(logits, visible)[:, :, reach:] * visible[:, :, reach:]
            return weighted_values(text.call, weights)

        output, weights = in_chunks(call, count, max(reach, rows_at_once(call, copies=2 + reach)), of)
        if state is not None:
            state.write(_QUERIES, text.queries(count, count + reach))
            terms = text.terms(count, count + reach).expand(len(call.query), -1, -1, -1)
            state.write(_TERMS, terms.flatten(1, 2), per_key=True)
        return text.as_given(output, weights)


@dataclass(eq=False)
class _Text:
    """The rows of a call, behind so many (`reach`) of earlier calls, in the order of the text; and so its keys.

    Attributes:
        given: the call.
        call: the same with its keys in the order of the text, for what does not ask its mask.
        reach: number of earlier rows; those that there are not see nothing.
        query: `(B, H, reach + Tq, D)` queries as they came.
        past: `(B or 1, 1 or H, reach, Tk)` terms of earlier rows, as of `terms`.
        rows: `(B or 1, reach + Tq)` which of these is next in the text; `None`: as they came.
        keys: `(B or 1, Tk)` the same of keys.
    """

    given: AttentionCall
    call: AttentionCall
    reach: int
    query: torch.Tensor
    past: torch.Tensor
    rows: torch.Tensor | None = None
    keys: torch.Tensor | None = None

    @classmethod
    def of(cls, call: AttentionCall, reach: int, state: SequenceState | None) -> "_Text":
        """The text of a call, from what is remembered of earlier ones."""
        (batch, heads, count, width), size = call.query.shape, call.key.shape[2]
        dtype = torch.promote_types(call.query.dtype, torch.float32)
        query = call.query.new_zeros(batch, heads, reach, width)
        past = call.query.new_full((1, 1, reach, size), -torch.inf, dtype=dtype)
        if state is not None and _QUERIES in state.tensors:
            own = call.context.own_key()
            new = torch.arange(count, device=past.device) + (0 if own is None else own)
            query = state.tensors[_QUERIES].to(query.dtype)
            past = state.per_key[_TERMS].index_fill(-1, new, -torch.inf).unflatten(1, (-1, reach))
        query = torch.cat([query, call.query], dim=2)
        mask = call.mask
        if mask.pairs is None and mask.real_columns is None:  # nothing is padding
            return cls(call, call, reach, query, past)
        earlier, now = (past > -torch.inf).any(dim=3).any(dim=1), mask.real()
        longest = max(len(earlier), len(now))
        real = torch.cat([each.expand(longest, -1) for each in (earlier, now)], dim=1)
        keys = ranks.real_keys(mask)[:, 0].to(torch.uint8).argsort(dim=-1, stable=True)
        key, value = (torch.take_along_dim(each, keys[:, None, :, None], dim=2) for each in (call.key, call.value))
        rows = real.to(torch.uint8).argsort(dim=-1, stable=True)
        return cls(call, call.replace(key=key, value=value), reach, query, past, rows, keys)

    def numbers(self, first: int, last: int) -> torch.Tensor:
        """`(B or 1, last - first)` which rows these of the text are."""
        if self.rows is None:
            return torch.arange(first, last, device=self.query.device)[None]
        return self.rows[:, first:last]

    def queries(self, first: int, last: int) -> torch.Tensor:
        """`(B, H, last - first, D)` of these rows of the text."""
        if self.rows is None:
            return self.query[:, :, first:last]
        return torch.take_along_dim(self.query, self.numbers(first, last)[:, None, :, None], dim=2)

    def terms(self, first: int, last: int) -> torch.Tensor:
        """`(B or 1, 1 or H, last - first, Tk)` what is added to the logits of these rows: of hidden keys -inf.

        Keys are as they came.
        """
        numbers, mask = self.numbers(first, last), self.given.mask
        own = (numbers - self.reach).clamp(min=0)
        of_rows = mask.of_rows(own)
        visible = of_rows.seen() & of_rows.real()[:, None, :, None]
        found = torch.zeros_like(visible, dtype=self.past.dtype)
        bias, added = self.given.kwargs.get("position_bias"), of_rows.added()
        if bias is not None:
            bias = bias[..., : mask.keys].to(found.dtype)
            found = found + (bias if bias.shape[2] == 1 else torch.take_along_dim(bias, own[:, None, :, None], dim=2))
        if added is not None:
            found = found + added.to(found.dtype).where(visible, 0.0)
        found = found.masked_fill(~visible, -torch.inf)
        if self.reach == 0 or (self.rows is None and first >= self.reach):
            return found
        past = torch.take_along_dim(self.past, numbers.clamp(max=self.reach - 1)[:, None, :, None], dim=2)
        return torch.where((numbers < self.reach)[:, None, :, None], past, found)

    def logits(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `(B, H, last - first, Tk)` of these rows of the text, and what of them is visible."""
        terms = self.terms(first, last)
        if self.keys is not None:
            terms = torch.take_along_dim(terms, self.keys[:, None, None], dim=3)
        visible = terms > -torch.inf
        logits = capped_logits(self.call, self.queries(first, last))
        return torch.where(visible, logits + terms, HIDDEN), visible

    def as_given(self, output: torch.Tensor, weights: torch.Tensor | None) -> AttentionOutput:
        """Output `(B, Tq, H, D)` and weights `(B, H, Tq, Tk)` of the text's last rows, put where they came from."""
        if self.rows is None or self.keys is None:
            return output, weights
        place = self.rows.argsort(dim=-1)[:, self.reach :] - self.reach
        place = place.clamp(min=0)  # padding may be further in front
        output = torch.take_along_dim(output, place[:, :, None, None], dim=1)
        if weights is None:
            return output, None
        weights = torch.take_along_dim(weights, place[:, None, :, None], dim=2)
        return output, torch.take_along_dim(weights, self.keys.argsort(dim=-1)[:, None, None], dim=3)
