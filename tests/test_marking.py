"""Spans that are built from text, against where its characters are: a token is a byte here."""

import pytest

from patchattn.positions.marking import mark_hierarchy, mark_segments, mark_turns

from .long_context import BYTES, byte_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETFUL = "{% for m in messages %}<{{ m['role'] }}>{% if loop.last %}{{ m['content'] }}{% endif %}{% endfor %}"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def texts(marked: object) -> list[tuple[str, str]]:
    ids, spans = marked  # type: ignore[misc]
    return [(span.kind, BYTES.decode(ids[span.start : span.end])) for span in spans]


def test_segments() -> None:
    found = mark_segments(BYTES, [("prefix", "Read: "), ("document", "one"), ("document", "three"), (None, " Why?")])
    assert BYTES.decode(found.input_ids) == "<s>Read: onethree Why?"
    assert texts(found) == [("prefix", "<s>Read: "), ("document", "one"), ("document", "three")]
    assert texts(mark_segments(BYTES, [("document", "one"), (None, "?")])) == [("prefix", "<s>"), ("document", "one")]
    bare = mark_segments(BYTES, [("sentence", "one"), (None, "?"), ("sentence", "two")], add_special_tokens=False)
    assert texts(bare) == [("sentence", "one"), ("sentence", "two")]
    assert BYTES.decode(bare.input_ids) == "one?two"


def test_turns_of_a_chat() -> None:
    found = mark_turns(byte_tokenizer(TEMPLATE), CHAT, add_generation_prompt=True)
    assert BYTES.decode(found.input_ids) == "<s><system>Be brief.<user>Hi<assistant>"
    assert texts(found) == [("system", "<s><system>Be brief."), ("user", "<user>Hi")]


def test_a_hierarchy() -> None:
    found = mark_hierarchy(BYTES, [["ab", "c"], ["d"]], anchors=(1, 2, 3))
    a, b, c, d = BYTES("abcd", add_special_tokens=False)["input_ids"]
    assert found.input_ids == [1, 2, 3, a, b, 3, c, 2, 3, d]
    assert [tuple(span) for span in found.spans] == [
        ("document", 0, 1, 2),
        ("section", 1, 2, 1),
        ("sentence", 2, 5, 0),
        ("sentence", 5, 7, 0),
        ("section", 7, 8, 1),
        ("sentence", 8, 10, 0),
    ]


def test_what_is_refused() -> None:
    for segments, error, says in (
        ([("document", "")], ValueError, "is of no token"),
        ([("chapter", "a")], ValueError, "no kind of span 'chapter'"),
        ([("document", 3)], TypeError, "pairs of a kind and a text"),
        ("document", TypeError, "pairs of a kind and a text"),
    ):
        with pytest.raises(error, match=says):
            mark_segments(BYTES, segments)
    with pytest.raises(ValueError, match="no kind of span 'robot'"):
        mark_turns(byte_tokenizer(TEMPLATE), [{"role": "robot", "content": "beep"}])
    with pytest.raises(ValueError, match="at least one message"):
        mark_turns(byte_tokenizer(TEMPLATE), [])
    with pytest.raises(NotImplementedError, match="the first 1 of 2 messages otherwise"):
        mark_turns(byte_tokenizer(FORGETFUL), CHAT)
    for sections, anchors, error, says in (
        ([["a"]], (1, 2), TypeError, "Anchors are"),
        (["a"], (1, 2, 3), TypeError, "a list of sections"),
        ([[]], (1, 2, 3), ValueError, "leave out empty ones"),
    ):
        with pytest.raises(error, match=says):
            mark_hierarchy(BYTES, sections, anchors=anchors)  # type: ignore[arg-type]
