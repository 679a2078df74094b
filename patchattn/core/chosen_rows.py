"""Which tokens an edit acts on, counted along the sequence, so that prefills, chunks and decoding steps agree."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import torch

from .call import AttentionCall
from .settings import option
from .token_numbers import last_rows, row_numbers
from .variant import VariantConfig

_marks: ContextVar[tuple[tuple[int, ...], ...] | None] = ContextVar("marks", default=None)


@contextmanager
def marked_tokens(tokens: Sequence[Sequence[int]]) -> Iterator[None]:
    """Say which tokens of each sequence `rows="marked"` edits, in a `with` block.

    Args:
        tokens: for every sequence of the batch their numbers, maybe none; the first token that is no padding is 0.

    Raises:
        ValueError: no sequence, or a negative number.
        TypeError: something else than a list of integers for each sequence.
    """
    if not isinstance(tokens, Sequence) or not all(isinstance(of_one, Sequence) for of_one in tokens):
        raise TypeError(f"Marks are a list of numbers for each sequence, got {tokens!r}.")
    numbers = [number for of_one in tokens for number in of_one]
    if wrong := [number for number in numbers if isinstance(number, bool) or not isinstance(number, int)]:
        raise TypeError(f"Marks are numbers of tokens, got {wrong[0]!r}.")
    if not tokens or min(numbers, default=0) < 0:
        raise ValueError(f"Marks are of at least one sequence, counted from 0, got {tokens!r}.")
    token = _marks.set(tuple(tuple(of_one) for of_one in tokens))
    try:
        yield
    finally:
        _marks.reset(token)


@dataclass(frozen=True, kw_only=True)
class RowConfig(VariantConfig):
    """Settings of which tokens are edited."""

    rows: Literal["all", "last", "from", "marked"] = option(
        "all",
        help="Which tokens are edited: all; the last one that a call brings of each sequence (last); from the one with "
        "the number first_row on (from); those that tokens names (marked).",
    )
    first_row: int = option(
        0, help="With rows=from: number of the first edited token; the first that is not padding is 0.", minimum=0
    )
    tokens: tuple[int, ...] | None = option(
        None,
        help="With rows=marked: numbers of the edited tokens, the same in every sequence; the first that is not "
        "padding is 0. None: `with marked_tokens(...)` says them of each sequence.",
        minimum=0,
    )
    phase: Literal["both", "prompt", "decoding"] = option(
        "both",
        help="In which calls: all (both), those that begin a text (prompt), or those that go on with one (decoding).",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens is not None and self.rows != "marked":
            raise ValueError(f'tokens are for rows="marked", got rows={self.rows!r}.')
        if self.rows != "from" and self.first_row != 0:
            raise ValueError(f'first_row={self.first_row} is for rows="from", got rows={self.rows!r}.')

    @property
    def looks_ahead(self) -> bool:
        return self.rows == "last" or self.phase != "both"

    @property
    def edits_all(self) -> bool:
        """Whether every token of every call is edited, so that none need be told from others."""
        return self.rows == "all" and self.phase == "both"

    def of_call(self, call: AttentionCall) -> torch.Tensor | None:
        """`(B or 1, Tq)` bool: which rows of a call are edited; `None`: all."""
        chosen = None
        if self.rows == "last":
            chosen = last_rows(call.mask)
        elif self.rows != "all":
            chosen = self.among(row_numbers(call.mask), len(call.query))
        if self.phase == "both":
            return chosen
        own = call.context.own_key()
        begins = call.mask.queries == call.mask.columns if own is None else own == 0
        wanted = torch.as_tensor(begins, device=call.query.device).view(1, 1) == (self.phase == "prompt")
        return wanted if chosen is None else chosen & wanted

    def among(self, numbers: torch.Tensor, batch: int) -> torch.Tensor:
        """`(B or 1, T)` bool: of which numbers of tokens `rows` speaks, where that is "from" or "marked".

        Raises:
            ValueError: nobody said which tokens are marked, or not for as many sequences.
        """
        if self.rows == "from":
            return numbers >= self.first_row
        marks = _marks.get() if self.tokens is None else (self.tokens,)
        if marks is None or batch % len(marks):
            given = "nobody said of which" if marks is None else f"{len(marks)} lists of them are given"
            raise ValueError(
                f'rows="marked" edits tokens of a batch of {batch} sequences, and {given}: give tokens=[...] for all '
                "sequences, or a list for each by `with marked_tokens([[...], ...]):`."
            )
        width = max(map(len, marks))
        table = torch.tensor([[*of_one, *[-2] * (width - len(of_one))] for of_one in marks], dtype=torch.long)
        wanted = table.repeat_interleave(batch // len(marks), dim=0) if len(marks) > 1 else table  # by beams
        return (numbers[..., None] == wanted.to(numbers.device)[:, None]).any(-1)
