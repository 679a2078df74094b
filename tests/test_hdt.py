"""HDT against the plain model with masks written out from a document's sections and sentences."""

from typing import Any

import pytest
import torch

import patchattn
from patchattn.positions.marking import mark_hierarchy

from .families import FAMILIES
from .long_context import BYTES

DOC, SEC, SENT = 1, 2, 3


def neighbours(sections: list[list[int]]) -> list[set[int]]:
    """What each token of a document sees; its sections are lists of the lengths of sentences without their anchors."""
    seen: list[set[int]] = [{0}]
    anchors = [0]
    for section in sections:
        own = len(seen)
        anchors.append(own)
        seen.append({own})
        heads = [own]
        for length in section:
            sentence = list(range(len(seen), len(seen) + 1 + length))
            heads.append(sentence[0])
            seen += [set(sentence) for _ in sentence]
        for head in heads:
            seen[head] |= set(heads)
    for anchor in anchors:
        seen[anchor] |= set(anchors)
    return seen


def test_the_example_of_the_paper_s_mask() -> None:
    """[DOC] [SEC] [c1] a [c2] b."""
    assert neighbours([[1, 1]]) == [{0, 1}, {0, 1, 2, 4}, {1, 2, 3, 4}, {2, 3}, {1, 2, 4, 5}, {4, 5}]


@pytest.fixture(scope="module")
def model() -> Any:
    made: Any = FAMILIES["bert"].make_exact()
    return made.base_model


@pytest.mark.parametrize("lengths", [[[1, 1]], [[2, 3], [1], [2, 1, 1]]])
def test_masks_written_out(model: Any, lengths: list[list[int]]) -> None:
    texts = [["x" * length for length in section] for section in lengths]
    ids, spans = mark_hierarchy(BYTES, texts, anchors=(DOC, SEC, SENT))
    tokens = torch.tensor([[token if token < 4 else 4 + (7 * place) % 50 for place, token in enumerate(ids)]])
    pairs = torch.tensor([[key in seen for key in range(len(ids))] for seen in neighbours(lengths)])
    added = torch.zeros(pairs.shape, dtype=torch.float64).masked_fill(~pairs, torch.finfo(torch.float64).min)
    with torch.no_grad():
        expected = model(tokens, attention_mask=added[None, None])[0]
        assert (model(tokens)[0] - expected).abs().max() > 1e-3
        with patchattn.patched(model, "hdt"), patchattn.marked(model, [spans]):
            found = model(tokens)[0]
            padded = torch.nn.functional.pad(tokens, (0, 4))
            again = model(padded, attention_mask=(padded > 0).long())[0][:, : len(ids)]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(again, expected, rtol=1e-9, atol=1e-9)


def test_several_documents_do_not_see_each_other(model: Any) -> None:
    spans = [["document", 0, 1, 2], ["section", 1, 2, 1], ["sentence", 2, 4], ["document", 4, 5, 2], ["sentence", 5, 8]]
    tokens = torch.arange(10, 18)[None]
    with torch.no_grad(), patchattn.patched(model, "hdt", spans=spans):
        whole = model(tokens)[0]
        changed = tokens.clone()
        changed[0, :4] = 50
        assert torch.equal(model(changed)[0][:, 4:], whole[:, 4:])
        assert not torch.equal(model(changed)[0][:, :4], whole[:, :4])


def test_what_is_refused(model: Any) -> None:
    for wrong in (["section", 0, 1], ["sentence", 0, 2, 1], ["user", 0, 2]):
        with pytest.raises(ValueError, match="HDT reads spans of sentences at level 0"):
            patchattn.patch_model(model, "hdt", spans=[wrong])
    with pytest.raises(NotImplementedError, match="'hdt' does not support causal or cross"):
        patchattn.patch_model(FAMILIES["llama"].make(), "hdt")
