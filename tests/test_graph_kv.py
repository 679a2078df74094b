"""Graph-KV against texts that the plain model encodes one by one, whose keys and values are put together."""

from typing import Any

import pytest
import torch

import patchattn

from .families import FAMILIES
from .pieces import check_second_turn, encoded, in_chunks, moved

IDS = torch.randint(3, 60, (19,), generator=torch.Generator().manual_seed(8))
PREFIX, SOURCES, REST = 2, [(2, 4), (4, 8)], 14
DOCUMENTS = {"sequential": [(8, 11), (11, 14)], "graph": [(8, 14)]}


def spans(form: str) -> list[list[Any]]:
    parts = [("source", *piece) for piece in SOURCES] + [("document", *piece) for piece in DOCUMENTS[form]]
    return [["prefix", 0, PREFIX], *(list(part) for part in parts)]


def one_by_one(model: Any, form: str, order: tuple[int, int] = (0, 1)) -> torch.Tensor:
    """Logits of what follows."""
    _, prefix = encoded(model, IDS[:PREFIX], 0)
    pieces = [IDS[slice(*SOURCES[number])] for number in order]
    if form == "graph":
        stored = [encoded(model, piece, PREFIX)[1] for piece in pieces]
        (document,) = DOCUMENTS[form]
        stored.append(encoded(model, IDS[slice(*document)], PREFIX + 4, stored)[1])
        return encoded(model, IDS[REST:], PREFIX + 4 + 6, [prefix, *stored])[0]
    stored, place = [], PREFIX
    for piece in pieces:
        stored.append(encoded(model, piece, place)[1])
        place += len(piece)
    read = [encoded(model, IDS[slice(*document)], place, stored)[1] for document in DOCUMENTS[form]]
    return encoded(model, IDS[REST:], REST, [prefix, *stored, read[0], moved(model, read[1], 3)])[0]


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILIES["llama"].make_exact()


@pytest.mark.parametrize("form", ["sequential", "graph"])
def test_texts_that_are_encoded_one_by_one(model: Any, form: str) -> None:
    expected = one_by_one(model, form)
    with patchattn.patched(model, "graph_kv", form=form, spans=spans(form)), torch.no_grad():
        found = model(IDS[None]).logits[0, REST:]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    with patchattn.patched(model, "block_attention", spans=spans(form)), torch.no_grad():
        assert (model(IDS[None]).logits[0, REST:] - expected).abs().max() > 1e-3


def test_permuting_sources_leaves_what_follows_in_the_form_of_a_graph_alone(model: Any) -> None:
    ids = torch.cat([IDS[:2], IDS[4:8], IDS[2:4], IDS[8:]])
    for form in ("sequential", "graph"):
        there = [["prefix", 0, 2], ["source", 2, 6], ["source", 6, 8], *spans(form)[3:]]
        patchattn.patch_model(model, "graph_kv", form=form)
        with torch.no_grad(), patchattn.marked(model, [spans(form), there]):
            one, other = model(torch.stack([IDS, ids])).logits[:, REST:]
        patchattn.unpatch_model(model)
        if form == "graph":
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        else:
            assert (one - other).abs().max() > 1e-3
            torch.testing.assert_close(other, one_by_one(model, form, (1, 0)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["sequential", "graph"])
def test_padding_chunks_and_a_second_turn(model: Any, form: str) -> None:
    """The same text twice, once padded by three, rotated by column."""
    padded = torch.stack([torch.nn.functional.pad(IDS, (3, 0)), torch.cat([IDS, IDS[:3]])])
    mask = (padded > 0).long()
    with patchattn.patched(model, "graph_kv", form=form, spans=spans(form)), torch.no_grad():
        expected = [model(IDS[None]).logits[0], model(padded[1:]).logits[0]]
        found = model(padded, attention_mask=mask).logits
        chunks = in_chunks(model, padded, mask, (4, 6, *[1] * 3, 9))
        how = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        check_second_turn(model, padded, mask, **how)
    for logits in (found, chunks):
        torch.testing.assert_close(logits[0, 3:], expected[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(logits[1], expected[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["sequential", "graph"])
def test_a_document_without_sources_is_the_model_itself(model: Any, form: str) -> None:
    with torch.no_grad():
        plain = model(IDS[None]).logits
        with patchattn.patched(model, "graph_kv", form=form, spans=[["document", 0, 14]]):
            torch.testing.assert_close(model(IDS[None]).logits, plain, rtol=1e-6, atol=1e-6)


def test_what_is_refused(model: Any) -> None:
    for given, form, says in (
        ([["document", 0, 2], ["source", 2, 4]], "sequential", "put the spans of kind 'source' first"),
        ([["section", 0, 2]], "sequential", "prefix, source and document, got 'section'"),
        ([["document", 0, 2], ["document", 2, 4]], "graph", "reads one document behind its sources, got 2"),
        ([["source", 1, 2]], "graph", "the tokens 0 to 0 before"),
    ):
        with pytest.raises(ValueError, match=says):
            patchattn.patch_model(model, "graph_kv", spans=given, form=form)
    with pytest.raises(NotImplementedError, match="sliding window"):
        patchattn.patch_model(FAMILIES["mistral"].make(), "graph_kv")
