"""CAD against two forwards of the unpatched model, one over the prompt without its context."""

from typing import Any

import pytest
import torch

import patchattn
from patchattn.decoding.text import context_spans

from .reference import tiny_llama
from .test_decoding import decode

PROMPT = torch.tensor([[3, 7, 1, 9, 22, 5, 8]])


def model_of() -> Any:
    model: Any = tiny_llama(num_hidden_layers=2)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


@torch.no_grad()
def expected(prompt: torch.Tensor, tokens: torch.Tensor, span: tuple[int, int], alpha: float) -> torch.Tensor:
    """`(STEPS, V)` from whole texts, with and without what is in the span."""
    model = model_of()
    bare = torch.cat([prompt[:, : span[0]], prompt[:, span[1] :]], dim=1)
    full, less = (model(torch.cat([one, tokens], dim=1)).logits[0, -5:-1] for one in (prompt, bare))
    return (1 + alpha) * full - alpha * less


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("span", [(0, 2), (2, 5), (4, 7)])
def test_steps_are_those_of_two_forwards(span: tuple[int, int], alpha: float) -> None:
    model = patchattn.patch_model(model_of(), "cad", span=list(span), alpha=alpha)
    tokens, steps = decode(model, {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)})
    want = expected(PROMPT, tokens, span, alpha)
    torch.testing.assert_close(steps[0].double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_every_sequence_has_a_context_of_its_own(beams: int) -> None:
    mask = torch.tensor([[1] * 7, [0, 0, 0, 1, 1, 1, 1]])
    given = {"input_ids": PROMPT.repeat(2, 1) * mask, "attention_mask": mask}
    spans, alone = [(1, 6), (0, 2)], [PROMPT, PROMPT[:, 3:]]
    model = patchattn.patch_model(model_of(), "cad")
    with context_spans(spans):
        tokens = decode(model, given, num_beams=beams)[0]
    for row in range(2):
        one = {"input_ids": alone[row], "attention_mask": torch.ones_like(alone[row])}
        with context_spans(spans[row : row + 1]):
            found, steps = decode(model, one, num_beams=beams)
        assert torch.equal(found[0], tokens[row])
        if beams == 1:
            want = expected(alone[row], found, spans[row], 0.5)
            torch.testing.assert_close(steps[0].double(), want, rtol=1e-5, atol=1e-5)


def test_rows_of_the_context_keep_the_model_s_logits_and_those_before_it_too() -> None:
    model = patchattn.patch_model(model_of(), "cad", span=[2, 5], alpha=2.0)
    with torch.no_grad():
        got, plain = model(PROMPT).logits[0], model_of()(PROMPT).logits[0]
    torch.testing.assert_close(got[:5], plain[:5])
    assert not torch.allclose(got[5], plain[5], atol=1e-2)


def test_what_is_refused() -> None:
    model = patchattn.patch_model(model_of(), "cad")
    with pytest.raises(ValueError, match="say where it is"):
        model(PROMPT)
    with context_spans([(1, 3), (1, 3)]), pytest.raises(ValueError, match="2 spans for a batch of 1"):
        model(PROMPT)
    for span in ((3, 8), (0, 7)):
        with context_spans([span]), pytest.raises(ValueError, match="must lie within it and leave something"):
            model(PROMPT)
    with pytest.raises(ValueError, match="ends after it begins"), context_spans([(3, 3)]):
        pass
    with pytest.raises(TypeError, match="A span is the number"):
        patchattn.patch_model(model_of(), "cad", span=[1])
