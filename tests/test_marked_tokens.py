"""Marks that differ from sequence to sequence, against hooks before the output projection and against one at a time."""

from typing import Any

import pytest
import torch

import patchattn
from patchattn.core.chosen_rows import marked_tokens

from .reference import DIM, HEADS, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13], [4, 4, 8, 2, 30, 6, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]])
MARKS = [[0, 5], [2]]
PLACES = [[0, 5], [4]]  # in the padded batch


def test_every_sequence_has_its_own() -> None:
    model = tiny_llama()
    projection = model.model.layers[0].self_attn.o_proj

    def zero(module: Any, args: Any) -> Any:
        states = args[0].clone().unflatten(-1, (HEADS, DIM))
        for row, places in enumerate(PLACES):
            states[row, places, 1] = 0
        return (states.flatten(-2),)

    handle = projection.register_forward_pre_hook(zero)
    with torch.no_grad():
        want = model(TOKENS, attention_mask=MASK).logits
        handle.remove()
        plain = model(TOKENS, attention_mask=MASK).logits
        patchattn.patch_model(model, "heads", heads={0: [1]}, rows="marked")
        with marked_tokens(MARKS):
            found = model(TOKENS, attention_mask=MASK).logits
        with marked_tokens([[], []]):
            none = model(TOKENS, attention_mask=MASK).logits
    torch.testing.assert_close(found[MASK.bool()], want[MASK.bool()], rtol=0, atol=1e-6)
    torch.testing.assert_close(none[MASK.bool()], plain[MASK.bool()], rtol=0, atol=1e-6)
    assert (found - plain)[0, 0].abs().max() > 1e-4
    assert (found - plain)[1, 4].abs().max() > 1e-4


@pytest.mark.parametrize("beams", [1, 3])
def test_values_of_marked_tokens_in_generation(beams: int) -> None:
    """Each sequence alone, with its marks as a setting."""
    how = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    settings = {"heads": {0: [0, 1], 1: [0, 1]}, "edit": "value", "gain": -3.0, "rows": "marked"}
    model = tiny_llama(num_hidden_layers=2)
    plain = model.generate(TOKENS, attention_mask=MASK, **how)
    patchattn.patch_model(model, "heads", settings)
    with marked_tokens(MARKS):
        found = model.generate(TOKENS, attention_mask=MASK, **how)
    patchattn.unpatch_model(model)
    for row, (start, tokens) in enumerate(zip((0, 2), MARKS, strict=True)):
        patchattn.patch_model(model, "heads", {**settings, "tokens": tokens})
        alone = model.generate(TOKENS[row : row + 1, start:], attention_mask=MASK[row : row + 1, start:], **how)
        patchattn.unpatch_model(model)
        assert found[row, 7:].tolist() == alone[0, 7 - start :].tolist()
    assert not torch.equal(found, plain)


def test_what_is_refused() -> None:
    model = patchattn.patch_model(tiny_llama(), "heads", rows="marked", heads={0: [1]})
    with pytest.raises(ValueError, match="nobody said of which: give tokens"):
        model(TOKENS)
    with marked_tokens([[1], [2], [3]]), pytest.raises(ValueError, match="a batch of 2 sequences, and 3 lists"):
        model(TOKENS)
    for given, error in (([], ValueError), ([[-1]], ValueError), ([3], TypeError), ([[True]], TypeError)):
        with pytest.raises(error, match="Marks are"), marked_tokens(given):
            pass
