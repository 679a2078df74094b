"""Texts that are read in pieces: each is encoded by itself, and what follows the last of them reads all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.call import AttentionCall
from ..core.chain import window_of
from ..core.keeping import of_query_heads
from ..core.selection import require_causal
from ..core.sites import AttentionSite
from .rotary import ROTATED_BY
from .spans import Span, SpansConfig, SpanVariant, Text
from .variant import RotaryConfig, RotaryVariant

QUERY, PREFIX = 0, -1  # segments of what follows the pieces, and of what they share; pieces are counted from 1
SEGMENT, PLACE = "segment", "place"  # facts of keys


def segments(text: Text, count: int) -> list[int]:
    """Which piece each of the first tokens of a sequence is of."""
    found = [QUERY] * count
    for number, span in enumerate(text, start=1):
        found[span.start : span.end] = [PREFIX if span.kind == "prefix" else number] * (span.end - span.start)
    return found


def reads(row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Whether queries in one segment see keys in another, where pieces see the prefix besides themselves."""
    return (row == key) | (key == PREFIX) | (row == QUERY)


def shared_places(text: Text, count: int) -> list[int]:
    """Where each of the first tokens of a sequence stands: pieces all behind the prefix, what follows behind the
    longest."""
    prefix, pieces = without_prefix(text)
    lengths = [span.end - span.start for span in pieces]
    found = [*range(prefix), *(prefix + place for length in lengths for place in range(length))]
    follows = prefix + max(lengths, default=0)
    return [*found, *range(follows, follows + count - len(found))]


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

    @property
    def segments(self) -> Callable[[Text, int], Sequence[int]]:
        """Says of the spans of a sequence which segment each of its first tokens is of."""
        return segments

    def check_text(self, text: Text) -> None:
        check_pieces(text, type(self).__name__)

    def key_facts(self, call: AttentionCall) -> Mapping[str, torch.Tensor]:
        if SEGMENT in call.facts:
            raise NotImplementedError(
                f"{type(self).__name__} reads a text in pieces, and in {self.site.name} another variant already reads "
                "the pieces: patch one of the two."
            )
        self.note_tokens(call)
        return {SEGMENT: self.of_rows(call, self.segments).expand(len(call.query), -1)}

    def by_pair(self, call: AttentionCall, seen: Any) -> torch.Tensor:
        """`(B, 1 or H, Tq, Tk)` bool: `seen(row, key)` of the pieces that queries and keys are of."""
        row = self.of_rows(call, self.segments)[:, None, :, None]
        return of_query_heads(seen(row, call.key_fact(SEGMENT)[:, :, None]), call.query.shape[1])


@dataclass(frozen=True, kw_only=True)
class PlacedConfig(SpansConfig, RotaryConfig):
    """Settings of variants that read pieces at other positions."""

    @property
    def turns(self) -> bool:
        return self.spans != ()


class PlacedVariant(PieceVariant, RotaryVariant):
    """Reads pieces at other positions: by default all behind the prefix, and what follows them behind the longest."""

    config: PlacedConfig

    @classmethod
    def fit(cls, config: Any, model: nn.Module, sites: Sequence[AttentionSite]) -> tuple[Any, Sequence[AttentionSite]]:
        """Leave out what is not causal self-attention.

        Raises:
            NotImplementedError: there is nothing else, or a layer has a sliding window; or as `find_rotations`.
        """
        because = "what follows the pieces reads them, which an encoder reads at once"
        causal = require_causal(model, sites, by=f"'{cls.name}'", because=because)
        sliding = [site for site in causal if window_of(model.get_submodule(site.name)) is not None]
        if sliding and config.turns:
            raise NotImplementedError(
                f"'{cls.name}' places pieces side by side, and {sliding[0].name} has a sliding window, which would "
                "hide some of them by their distance in the text."
            )
        return super().fit(config, model, causal)

    @property
    def places(self) -> Callable[[Text, int], Sequence[int]]:
        """Says of the spans of a sequence where each of its first tokens stands, the last of which is of no piece."""
        return shared_places

    def key_facts(self, call: AttentionCall) -> Mapping[str, torch.Tensor]:
        facts = dict(super().key_facts(call))
        if self.rotary is None or self.rotary.is_rotated:
            facts |= self.rotated_by(call)
            facts[PLACE] = self.of_rows(call, self.places, counts_on=True).expand(len(call.query), -1)
        return facts

    def placed(self, call: AttentionCall) -> AttentionCall:
        """The call with queries and keys where they stand."""
        if self.rotary is None or not self.rotary.is_rotated:
            return call
        row = self.of_rows(call, self.places, counts_on=True)
        return call.replace(
            query=self.rotary.turned(call.query, self.rotary.rotated_by(call), row),
            key=self.rotary.turned(call.key, call.key_fact(ROTATED_BY), call.key_fact(PLACE)),
        )
