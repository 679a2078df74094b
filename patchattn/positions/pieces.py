"""Texts that are read in pieces: each is encoded by itself, and what follows the last of them reads all."""

from collections.abc import Mapping
from typing import Any

import torch

from ..core.call import AttentionCall
from ..core.keeping import of_query_heads
from .spans import Span, SpanVariant, Text

QUERY = 0  # the segment of what follows the pieces; they are counted from 1
SEGMENT = "segment"  # a fact of keys


def segments(text: Text, count: int) -> list[int]:
    """Which piece each of the first tokens of a sequence is of."""
    found = [QUERY] * count
    for number, span in enumerate(text, start=1):
        found[span.start : span.end] = [number] * (span.end - span.start)
    return found


def check_pieces(text: Text, by: str) -> None:
    """ValueError unless pieces follow each other from the first token on, a prefix before all others."""
    end = 0
    for number, span in enumerate(text):
        if span.start != end:
            raise ValueError(
                f"{by} reads pieces that follow each other from the first token on, and the tokens {end} to "
                f"{span.start - 1} before {list(span)} are in none: mark them as a part of a piece, or as prefix."
            )
        if span.kind == "prefix" and number:
            raise ValueError(f"A prefix is what stands before all pieces, got {list(text[0])} before {list(span)}.")
        end = span.end


def without_prefix(text: Text) -> tuple[int, Text]:
    """Length of the prefix, and the pieces."""
    pieces: tuple[Span, ...] = tuple(span for span in text if span.kind != "prefix")
    return (text[0].end if len(pieces) < len(text) else 0), pieces


class PieceVariant(SpanVariant):
    """A variant that reads texts in pieces; it remembers of every key which piece it is of."""

    @property
    def keeps_state(self) -> bool:
        return True

    def check_text(self, text: Text) -> None:
        check_pieces(text, type(self).__name__)

    def key_facts(self, call: AttentionCall) -> Mapping[str, torch.Tensor]:
        self.note_tokens(call)
        return {SEGMENT: self.of_rows(call, segments).expand(len(call.query), -1)}

    def by_pair(self, call: AttentionCall, seen: Any) -> torch.Tensor:
        """`(B, 1 or H, Tq, Tk)` bool: `seen(row, key)` of the pieces that queries and keys are of."""
        row = self.of_rows(call, segments)[:, None, :, None]
        return of_query_heads(seen(row, call.key_fact(SEGMENT)[:, :, None]), call.query.shape[1])
