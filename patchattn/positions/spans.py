"""Which tokens of a text belong together: documents, demonstrations, sections, sentences, turns of a chat.

Spans are of tokens counted along their sequence, so that a prefill, chunks and decoding steps agree. What a variant
makes of them of a key it remembers with the kv cache, as a fact of keys (`Variant.key_facts`).
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from ..core.call import AttentionCall
from ..core.selection import expect_model
from ..core.settings import nearest, option
from ..core.sites import AttentionSite
from ..core.variant import Variant, VariantConfig

KINDS = (
    "prefix",
    "document",
    "source",
    "demonstration",
    "section",
    "sentence",
    "system",
    "user",
    "assistant",
    "tool",
)


class Span(NamedTuple):
    """Tokens that belong together, those from `start` up to `end`; the first token that is no padding is 0.

    Attributes:
        kind: what they are, one of `KINDS`.
        start: number of the first of them.
        end: number of the token behind the last.
        level: of a hierarchy: 0 of sentences, 1 of what stands for a section, 2 for a document.
    """

    kind: str
    start: int
    end: int
    level: int = 0


Text = tuple[Span, ...]  # of one sequence, in their order
Plain = tuple[list[str | int], ...]  # the same, as settings hold them


def parse_spans(given: Any) -> Text:
    """The spans of one sequence, in the order of their tokens.

    Args:
        given: `Span`s, or lists `[kind, start, end]`, or `[kind, start, end, level]`.

    Raises:
        TypeError: something else.
        ValueError: an unknown kind, a span that is empty or begins below 0, or two that overlap.
    """
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"Spans are a list of [kind, start, end], got {given!r}.")
    found = sorted((_span(each) for each in given), key=lambda span: span.start)
    for one, other in itertools.pairwise(found):
        if other.start < one.end:
            raise ValueError(
                f"Spans must not overlap: {list(one)} and {list(other)} share tokens. Of parts of parts, mark the "
                "smallest, and tell what stands for the larger ones by its level."
            )
    return tuple(found)


def _span(given: Any) -> Span:
    parts = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else []
    kind, *numbers = parts or [None]
    if not isinstance(kind, str) or len(numbers) not in (2, 3) or not all(type(number) is int for number in numbers):
        raise TypeError(f"A span is [kind, start, end], such as ['document', 1, 7], got {given!r}.")
    span = Span(kind, *numbers)
    if kind not in KINDS:
        raise ValueError(f"There is no kind of span {kind!r}{nearest(kind, list(KINDS))}")
    if not 0 <= span.start < span.end or span.level < 0:
        raise ValueError(f"A span begins at 0 or later and ends after it begins, got {list(span)}.")
    return span


def plain_spans(given: Any) -> Plain:
    """The spans of one sequence as settings hold them; raises as `parse_spans`."""
    return tuple(list(span) for span in parse_spans(given))


class Marks:
    """The spans of every sequence of a batch, to be asked for by number of token.

    Args:
        texts: spans of each sequence; those of one alone are those of all.
    """

    def __init__(self, texts: Sequence[Text]) -> None:
        self.texts = tuple(texts)
        self.count = 1 + max((text[-1].end for text in self.texts if text), default=0)
        self.reached: torch.Tensor | None = None  # (S,) of each sequence, the largest number of a token that came
        self._tables: dict[Any, torch.Tensor] = {}

    def taken(
        self,
        of_text: Callable[[Text, int], Sequence[int]],
        numbers: torch.Tensor,
        batch: int,
        *,
        counts_on: bool = False,
    ) -> torch.Tensor:
        """`(B or 1, T)` what is said of the tokens with these numbers `(B or 1, T)`.

        Args:
            of_text: of the spans of a sequence, something of each of its first tokens, as many as are asked for.
            numbers: of tokens; below 0 of padding in front, which is as the first token.
            batch: B, a multiple of the number of sequences: that of their beams.
            counts_on: whether each token that comes later has the number after that of the one before; by default
                they are as the last of the first ones.

        Raises:
            ValueError: another number of sequences.
        """
        sequences = len(self.texts)
        if batch % sequences:
            raise ValueError(
                f"Spans are given of {sequences} sequences, and the batch has {batch}: give a list of spans for each."
            )
        table = self._table(of_text, numbers.device)
        if sequences > 1:
            table = table.repeat_interleave(batch // sequences, dim=0)
        index = numbers.clamp(0, self.count - 1)
        rows = max(len(index), len(table))
        found = table.expand(rows, -1).gather(1, index.expand(rows, -1))
        return found + (numbers - index).clamp(min=0) if counts_on else found

    def _table(self, of_text: Callable[[Text, int], Sequence[int]], device: torch.device) -> torch.Tensor:
        known = None if torch.compiler.is_compiling() else self._tables.get((of_text, device))
        if known is None:
            known = torch.tensor([list(of_text(text, self.count)) for text in self.texts], device=device)
            if not torch.compiler.is_compiling():
                self._tables[of_text, device] = known
        return known

    def note(self, numbers: torch.Tensor) -> None:
        """Tokens `(B or 1, T)` with these numbers have come."""
        last = numbers.amax(dim=1)
        sequences = len(self.texts)
        if len(last) % sequences == 0:
            last = last.view(sequences, -1).amax(dim=1)
        last = last.expand(sequences)
        self.reached = last if self.reached is None else torch.maximum(self.reached, last)

    def check_reached(self) -> None:
        """ValueError if a span lies outside of its text."""
        if self.reached is None:
            return
        for number, (text, last) in enumerate(zip(self.texts, self.reached.tolist(), strict=True)):
            if text and text[-1].end > last + 1:
                raise ValueError(
                    f"The span {list(text[-1])} lies outside of the text: of sequence {number} there came {last + 1} "
                    "tokens, padding not counted. Mark the very tokens that the model is given."
                )


_NONE: Mapping["SpanVariant", Marks] = MappingProxyType({})
_marks: ContextVar[Mapping["SpanVariant", Marks]] = ContextVar("spans", default=_NONE)


@dataclass(frozen=True, kw_only=True)
class SpansConfig(VariantConfig):
    """Settings of variants that read spans."""

    spans: Plain | None = option(
        None,
        parse=plain_spans,
        help="Spans of every text: lists [kind, start, end] of tokens, the first that is no padding is 0. None: `with "
        "patchattn.marked(model, spans)` says them of each sequence. An empty list changes nothing.",
    )


class SpanVariant(Variant):
    """A variant that reads spans: those of its settings, or of `marked`."""

    config: SpansConfig

    def __init__(self, config: Any, site: AttentionSite) -> None:
        super().__init__(config, site)
        self.fixed: Marks | None = None
        if config.spans is not None:
            text = parse_spans(config.spans)
            self.check_text(text)
            self.fixed = Marks([text])

    @classmethod
    def neutral_config(cls) -> dict[str, Any]:
        return {"spans": ()}

    @property
    def is_identity(self) -> bool:
        return self.config.spans == ()

    def check_text(self, text: Text) -> None:
        """ValueError if this variant makes nothing of such spans of a sequence."""

    def of_rows(
        self, call: AttentionCall, of_text: Callable[[Text, int], Sequence[int]], *, counts_on: bool = False
    ) -> torch.Tensor:
        """`(B or 1, Tq)` what is said of the tokens of the queries of a call; see `Marks.taken`.

        Raises:
            ValueError: nobody said spans of these sequences.
            NotImplementedError: a decoding variant runs a branch, whose tokens may be others; or as
                `AttentionCall.query_positions`.
        """
        if call.branch:
            raise NotImplementedError(
                f"{type(self).__name__} reads spans of a text, and the branch of a decoding variant may be of other "
                "tokens: patch one of the two."
            )
        marks = self._marks()
        if marks is None:
            raise ValueError(
                f"{type(self).__name__} reads spans of tokens, and nobody said them: call the model in a `with "
                "patchattn.marked(model, spans):` block, or give spans=[...] of every text when patching."
            )
        return marks.taken(of_text, call.query_positions(), len(call.query), counts_on=counts_on)

    def note_tokens(self, call: AttentionCall) -> None:
        """Tell `marked` of the tokens of a call."""
        marks = None if self.fixed else self._marks()
        if marks is not None and not torch.compiler.is_compiling():
            marks.note(call.query_positions())

    def _marks(self) -> Marks | None:
        return self.fixed if self.fixed is not None else _marks.get().get(self)  # which does not compile


@contextmanager
def marked(model: nn.Module, spans: Sequence[Sequence[Span | Sequence[str | int]]]) -> Iterator[None]:
    """Say which tokens of each sequence belong together, in a `with` block around all calls on these sequences.

    Keys in a kv cache keep the marks that they came with. Activation checkpointing runs layers again in `backward`,
    which must then be called in the block too.

    Args:
        model: a model patched by a variant that reads spans.
        spans: for every sequence of the batch its spans, maybe none: `Span`s or lists `[kind, start, end]` of tokens,
            the first that is no padding is 0.

    Raises:
        TypeError: something else than a list of spans for each sequence.
        ValueError: no variant of the model waits for spans; no sequence; spans that are empty, overlap, or are none
            that the variant knows; and, when the block ends, a span outside of its text.
    """
    expect_model("patchattn.marked", model)
    readers = [module for module in model.modules() if isinstance(module, SpanVariant)]
    waiting = [reader for reader in readers if reader.config.spans is None]
    if not waiting:
        reason = "the settings of its patch say the spans of every text already" if readers else "no patch reads spans"
        raise ValueError(
            f"{type(model).__name__} is not to be told spans: {reason}. Patch it by a variant that reads spans, "
            "without spans=..."
        )
    if isinstance(spans, str) or not isinstance(spans, Sequence):
        raise TypeError(f"Spans are a list of spans for each sequence, got {spans!r}.")
    if not spans:
        raise ValueError("Spans are of at least one sequence, got none.")
    texts = [parse_spans(of_one) for of_one in spans]
    for reader in waiting:
        for text in texts:
            reader.check_text(text)
    marks = Marks(texts)
    token = _marks.set({**_marks.get(), **dict.fromkeys(waiting, marks)})
    try:
        yield
    finally:
        _marks.reset(token)
    marks.check_reached()
