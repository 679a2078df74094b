"""Spans of tokens: what is no span is refused, and marks follow padding, chunks, beams and cropped caches."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import patchattn
from patchattn.core.kv_caches import cache_argument
from patchattn.positions.spans import Marks, Span, parse_spans

from .families import FAMILIES

IDS = torch.randint(3, 60, (2, 14), generator=torch.Generator().manual_seed(2))
SPANS: list[list[Any]] = [
    [["document", 0, 4], ["document", 4, 7]],
    [Span("document", 0, 3), Span("document", 3, 5), Span("document", 5, 9)],
]


@pytest.fixture(scope="module")
def model() -> Any:
    return patchattn.patch_model(FAMILIES["llama"].make_exact(), "block_attention")


@pytest.fixture(scope="module")
def alone(model: Any) -> list[torch.Tensor]:
    """Logits of each sequence by itself."""
    found = []
    for row, spans in zip(IDS, SPANS, strict=True):
        with torch.no_grad(), patchattn.marked(model, [spans]):
            found.append(model(row[None]).logits[0])
    return found


def test_spans_are_put_in_order_and_what_is_none_is_refused() -> None:
    given = [["document", 4, 6], ["prefix", 0, 2, 1]]
    assert parse_spans(given) == (Span("prefix", 0, 2, 1), Span("document", 4, 6))
    for wrong, error, says in (
        ([["document", 0, 3], ["document", 2, 4]], ValueError, "must not overlap"),
        ([["document", 3, 3]], ValueError, "ends after it begins"),
        ([["document", -1, 3]], ValueError, "begins at 0 or later"),
        ([["documents", 0, 3]], ValueError, "did you mean 'document'"),
        ([["document", 0]], TypeError, "A span is"),
        ([["document", 0, True]], TypeError, "A span is"),
        (["document"], TypeError, "A span is"),
        ("document", TypeError, "Spans are"),
    ):
        with pytest.raises(error, match=says):
            parse_spans(wrong)


def test_tokens_are_asked_for_by_number() -> None:
    marks = Marks([parse_spans([["document", 1, 3]]), ()])

    def ends(text: Any, count: int) -> list[int]:
        return [text[-1].end if text else -count for _ in range(count)]

    numbers = torch.tensor([[-1, 0, 9], [0, 1, 2], [0, 1, 2], [3, 4, 5]])
    assert marks.taken(ends, numbers, 4).tolist() == [[3] * 3, [3] * 3, [-4] * 3, [-4] * 3]
    with pytest.raises(ValueError, match="of 2 sequences, and the batch has 3"):
        marks.taken(ends, numbers[:3], 3)


def test_padded_sequences_with_spans_of_their_own(model: Any, alone: list[torch.Tensor]) -> None:
    ids = torch.zeros(2, 17, dtype=torch.long)
    ids[0, :14], ids[1, 3:] = IDS[0], IDS[1]
    mask = (ids > 0).long()
    with torch.no_grad(), patchattn.marked(model, SPANS):
        found = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[0, :14], alone[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[1, 3:], alone[1], rtol=1e-6, atol=1e-6)  # by column: float32 angles
    with torch.no_grad(), patchattn.marked(model, SPANS[::-1]):
        assert (model(IDS).logits[0] - alone[0])[3:].abs().max() > 1e-3


@pytest.mark.parametrize("sizes", [[1] * 14, [2, 5, 7], [13, 1]])
def test_calls_one_after_the_other(model: Any, alone: list[torch.Tensor], sizes: list[int]) -> None:
    """Twice, for the last three tokens are taken back and come again."""
    cache, parts = DynamicCache(), []
    with torch.no_grad(), patchattn.marked(model, SPANS):
        for part in IDS.split(sizes, dim=1):
            parts.append(model(part, **cache_argument(model, cache)).logits)
        cache.crop(-3)
        again = model(IDS[:, 11:], **cache_argument(model, cache)).logits
    torch.testing.assert_close(torch.cat(parts, dim=1), torch.stack(alone), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(again, torch.stack(alone)[:, 11:], rtol=1e-9, atol=1e-9)


def test_keys_keep_the_marks_that_they_came_with(model: Any, alone: list[torch.Tensor]) -> None:
    cache = DynamicCache()
    with torch.no_grad():
        with patchattn.marked(model, SPANS):
            model(IDS[:, :10], **cache_argument(model, cache))
        with patchattn.marked(model, [[], []]):  # what comes now is no part of any piece
            found = model(IDS[:, 10:], **cache_argument(model, cache)).logits
    torch.testing.assert_close(found, torch.stack(alone)[:, 10:], rtol=1e-9, atol=1e-9)


def test_beams_and_a_second_turn(model: Any) -> None:
    how = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    with patchattn.marked(model, SPANS):
        found = model.generate(IDS, attention_mask=mask, **how)
        uncached = model.generate(IDS, attention_mask=mask, use_cache=False, **how)
        cache, one = DynamicCache(), {**how, "num_beams": 1}
        first = model.generate(IDS, attention_mask=mask, **one, **cache_argument(model, cache))
        turn = torch.cat([first, IDS[:, :3]], dim=1)
        second = model.generate(turn, **one, **cache_argument(model, cache))
        assert torch.equal(second, model.generate(turn, **one))
    assert torch.equal(found, uncached)
    for row, spans in enumerate(SPANS):
        with patchattn.marked(model, [spans]):
            assert torch.equal(model.generate(IDS[row : row + 1], **how)[0], found[row])


def test_what_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"nobody said them: call the model in a `with patchattn\.marked"):
        model(IDS)
    outside = [[["document", 0, 15]], []]
    with (
        pytest.raises(
            ValueError, match=r"\['document', 0, 15, 0\] lies outside of the text: of sequence 0 there came 14"
        ),
        patchattn.marked(model, outside),
    ):
        model(IDS)
    padded = torch.ones_like(IDS)
    padded[1, :2] = 0
    with (
        pytest.raises(ValueError, match="of sequence 1 there came 12"),
        patchattn.marked(model, [[], [("document", 0, 13)]]),
    ):
        model(IDS, attention_mask=padded)
    for spans, error, says in (
        ([], ValueError, "at least one sequence"),
        ("text", TypeError, "a list of spans for each sequence"),
        ([[["document", 1, 3]]], ValueError, "the tokens 0 to 0 before"),
        ([[["document", 0, 3], ["document", 4, 6]]], ValueError, "the tokens 3 to 3 before"),
        ([[["document", 0, 3], ["prefix", 3, 6]]], ValueError, "A prefix is what stands before"),
    ):
        with pytest.raises(error, match=says), patchattn.marked(model, spans):
            pass
    plain = FAMILIES["llama"].make()
    with pytest.raises(ValueError, match="no patch reads spans"), patchattn.marked(plain, SPANS):
        pass
    patchattn.patch_model(plain, "block_attention", spans=[["document", 0, 3]])
    with pytest.raises(ValueError, match="say the spans of every text already"), patchattn.marked(plain, SPANS):
        pass
    with pytest.raises(ValueError, match="must not overlap"):
        patchattn.patch_model(
            FAMILIES["llama"].make(), "block_attention", spans=[["document", 0, 3], ["document", 2, 4]]
        )


def test_branches_of_decoding_variants_are_refused() -> None:
    spans = {"spans": [["document", 0, 3]]}
    model = patchattn.patch_model(FAMILIES["llama"].make(), "block_attention", spans)
    patchattn.patch_model(model, "cad", span=[1, 3])
    with pytest.raises(NotImplementedError, match="may be of other tokens"):
        model(IDS)


@pytest.mark.parametrize(
    ("variants", "says"),
    [
        (["block_attention", "graph_kv"], "already reads the pieces"),
        (["parallel_context", "self_extend"], "already turns its queries and keys"),
        (["parallel_context", "ape"], "already reads the pieces"),
        (["graph_kv", "qk_norm"], "graph_kv hands on queries and keys of twice the width"),
    ],
)
def test_two_variants_that_place_the_same_tokens_are_refused(variants: list[str], says: str) -> None:
    model = FAMILIES["llama"].make()
    spans = {"spans": [["source", 0, 3], ["document", 3, 6]]}
    patchattn.patch_model(
        model, variants, {name: spans if name not in ("self_extend", "qk_norm") else {} for name in variants}
    )
    with pytest.raises(NotImplementedError, match=says):
        model(IDS)
