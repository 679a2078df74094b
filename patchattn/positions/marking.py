"""Spans from text: segments that are named, or the turns of a chat, as tokens and the spans that they are."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from .spans import Span, parse_spans


class MarkedText(NamedTuple):
    """A text as a model takes it.

    Attributes:
        input_ids: its tokens.
        spans: which of them belong together, for `patchattn.marked`.
    """

    input_ids: list[int]
    spans: list[Span]


def mark_segments(
    tokenizer: PreTrainedTokenizerBase,
    segments: Sequence[tuple[str | None, str]],
    *,
    add_special_tokens: bool = True,
) -> MarkedText:
    """Tokens of a text that is given in segments, and their spans.

    Each segment is tokenized by itself, so that its tokens do not depend on its neighbours: pieces can change places,
    and what was encoded of one can be used again. Special tokens that the tokenizer puts in front are a prefix, alone
    or with a first segment of that kind; those that it puts behind are in no span.

    Args:
        tokenizer: of the model.
        segments: pairs of a kind (see `patchattn.positions.spans.KINDS`) and a text; of kind `None` what is no segment,
            such as the question that follows documents.
        add_special_tokens: whether the tokenizer's special tokens are added.

    Raises:
        TypeError: something else than such pairs.
        ValueError: an unknown kind, a segment of no token, or special tokens that are not told from those of a text.
    """
    if isinstance(segments, str) or not all(
        isinstance(segment, Sequence) and len(segment) == 2 and isinstance(segment[1], str) for segment in segments
    ):
        raise TypeError(f"Segments are pairs of a kind and a text, got {segments!r}.")
    front, back = _special_tokens(tokenizer) if add_special_tokens else ([], [])
    ids, spans = list(front), []
    for number, (kind, text) in enumerate(segments):
        start = len(ids)
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) == start:
            raise ValueError(f"Segment {number} ({kind}) is of no token: {text!r}. Leave it out.")
        if kind is not None:
            spans.append(Span(kind, 0 if kind == "prefix" and start == len(front) else start, len(ids)))
    if front and not any(span.start == 0 for span in spans):
        spans.insert(0, Span("prefix", 0, len(front)))
    return MarkedText(ids + back, list(parse_spans(spans)))


def mark_turns(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], **template: Any
) -> MarkedText:
    """Tokens of a chat by the tokenizer's template, and a span for every turn, whose kind is its role.

    A turn reaches from where the template begins it to where it begins the next one. What the template adds behind the
    last, such as the prompt for an answer, is in no span.

    Args:
        tokenizer: a fast one, with a chat template.
        messages: with a `role` and what else the template wants.
        template: what else it wants, such as `add_generation_prompt=True`.

    Raises:
        ValueError: no message, an unknown role, or a turn of no token.
        NotImplementedError: the tokenizer does not tell where its tokens are in a text, or the template writes earlier
            turns otherwise when others follow.
    """
    if not messages:
        raise ValueError("A chat has at least one message, got none.")
    if not tokenizer.is_fast:
        raise NotImplementedError(
            f"{type(tokenizer).__name__} does not tell where in a text its tokens are: load a fast tokenizer."
        )
    whole = _rendered(tokenizer, messages, **template)
    without = {**template, "add_generation_prompt": False}
    ends = []
    for count in range(1, len(messages) + 1):
        part = _rendered(tokenizer, messages[:count], **without)
        if not whole.startswith(part):
            raise NotImplementedError(
                f"The chat template writes the first {count} of {len(messages)} messages otherwise when others "
                "follow, so that turns cannot be told apart in the text: mark them by mark_segments."
            )
        ends.append(len(part))
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    starts = [first for first, _ in found["offset_mapping"]]
    spans, begin = [], 0
    for message, end in zip(messages, ends, strict=True):
        stop = begin
        while stop < len(starts) and starts[stop] < end:
            stop += 1
        spans.append(Span(message["role"], begin, stop))
        begin = stop
    return MarkedText(list(found["input_ids"]), list(parse_spans(spans)))


def mark_hierarchy(
    tokenizer: PreTrainedTokenizerBase, sections: Sequence[Sequence[str]], *, anchors: Sequence[int]
) -> MarkedText:
    """Tokens of a document that is given as sections of sentences, with an anchor in front of each, and their spans.

    The anchors of the document and of the sections are spans of their own, at levels 2 and 1; that of a sentence is its
    first token, at level 0.

    Args:
        tokenizer: of the model; none of its own special tokens is added.
        sections: the sentences of each section.
        anchors: ids of the anchors of a document, of a section and of a sentence.

    Raises:
        TypeError: something else than lists of texts, or than three ids.
        ValueError: no section, or one without sentences.
    """
    if len(anchors) != 3 or not all(type(anchor) is int for anchor in anchors):
        raise TypeError(f"Anchors are the ids of a document's, a section's and a sentence's, got {anchors!r}.")
    if isinstance(sections, str) or any(
        isinstance(section, str) or not all(isinstance(sentence, str) for sentence in section) for section in sections
    ):
        raise TypeError(f"A document is a list of sections, each a list of sentences, got {sections!r}.")
    if not sections or not all(sections):
        raise ValueError("A document has a section, and every section a sentence: leave out empty ones.")
    document, section_anchor, sentence_anchor = anchors
    ids, spans = [document], [Span("document", 0, 1, 2)]
    for section in sections:
        spans.append(Span("section", len(ids), len(ids) + 1, 1))
        ids.append(section_anchor)
        for sentence in section:
            start = len(ids)
            ids += [sentence_anchor, *tokenizer(sentence, add_special_tokens=False)["input_ids"]]
            spans.append(Span("sentence", start, len(ids)))
    return MarkedText(ids, spans)


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], **template: Any) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **template))


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What a tokenizer puts in front of a text, and behind it."""
    text = "a"
    inner = tokenizer(text, add_special_tokens=False)["input_ids"]
    outer = tokenizer(text)["input_ids"]
    for start in range(len(outer) - len(inner) + 1):
        if outer[start : start + len(inner)] == inner:
            return outer[:start], outer[start + len(inner) :]
    raise ValueError(
        f"{type(tokenizer).__name__} does not put its special tokens around those of a text: add them to the segments, "
        "with add_special_tokens=False."
    )
