"""Attention Transition against the rule by loops, in a batch, beside padding, in chunks and in generation."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import patchattn
from patchattn.softmax import rows

from .families import FAMILIES
from .reference import tiny_llama

LAYERS = 5
SETTINGS: dict[str, Any] = {"begin": 1, "last": 4, "inter_threshold": 0.9, "outer_threshold": 0.8}
TOKENS = torch.randint(3, 30, (2, 40), generator=torch.Generator().manual_seed(0))


def by_loops(weights: np.ndarray, layer: int, layers: int, how: dict[str, Any]) -> np.ndarray:
    """`(H, n, n)` as the released code goes about it, and with what is removed given whole."""
    count, begin, last = weights.shape[1], how["begin"], how["last"]
    found = weights.copy()
    jobs = []
    inner = count - begin - last - 3
    if how.get("inter", True) and inner > 0:
        width = -(-inner // (layers + 3))
        start = (layer + 3) * width + begin + 3
        band = range(layer * width + begin + 3, (layer + 1) * width + begin + 3)
        jobs.append((range(start, min(start + width, count - last)), band, how["inter_threshold"] / (start - begin)))
    outer = count - last - 3
    if how.get("outer", True) and outer > 0 and layer >= 1:
        width = -(-outer // (layers + 3))
        start = (layer + 2) * width + 3
        band = range(start, min(start + width, count - last))
        jobs.append((range(count - last, count), band, how["outer_threshold"] / (count - last)))
    for some, band, limit in jobs:
        for head in range(len(found)):
            for row in some:
                if not any(found[head, row, key] > limit for key in band):
                    continue
                kept = [value if value >= limit else 0.0 for value in found[head, row]]
                share = {key: 100 if kept[key] > 0 else 5 for key in band}
                removed = found[head, row].sum() - sum(kept)
                for key in band:
                    kept[key] += removed * share[key] / sum(share.values())
                found[head, row] = kept
    return found


def attention(model: LlamaForCausalLM, tokens: torch.Tensor, **how: Any) -> list[np.ndarray]:
    with torch.no_grad():
        return [layer[0].double().numpy() for layer in model(tokens, output_attentions=True, **how).attentions]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    made = tiny_llama(num_hidden_layers=LAYERS)
    made.set_attn_implementation("eager")
    return made.double()


@pytest.mark.parametrize("part", [{"outer": False}, {"inter": False}, {}])
def test_weights_are_moved_as_the_rule_says(model: LlamaForCausalLM, part: dict[str, bool]) -> None:
    """Layer by layer: where the layers before leave the same input, the plain weights are those of that layer alone."""
    how, changed = {**SETTINGS, **part}, 0
    for layer in range(LAYERS):
        plain = attention(model, TOKENS[:1])[layer]
        patchattn.patch_model(model, "attention_transition", how, layers=[layer])
        found = attention(model, TOKENS[:1])[layer]
        patchattn.unpatch_model(model)
        want = plain if layer == LAYERS - 1 else by_loops(plain, layer, LAYERS, how)
        np.testing.assert_allclose(found, want, rtol=0, atol=2e-6)
        np.testing.assert_allclose(found.sum(-1), 1, atol=2e-6)
        changed += int((abs(found - plain) > 1e-3).any())
    assert changed >= (2 if part else 4)


def test_batches_padding_chunks_and_generation(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        plain = model(TOKENS[:1]).logits
    patchattn.patch_model(model, "attention_transition", SETTINGS)
    with torch.no_grad():
        alone = [model(TOKENS[:1]).logits[0], model(TOKENS[1:, :31]).logits[0]]
        assert (alone[0] - plain[0]).abs().max() > 1e-3
        for left in (True, False):
            pad = torch.zeros(1, 9, dtype=torch.long)
            short = torch.cat([pad, TOKENS[1:, :31]] if left else [TOKENS[1:, :31], pad], dim=1)
            ids = torch.cat([TOKENS[:1], short])
            mask = torch.ones_like(ids)
            mask[1, :9] = 0 if left else 1
            mask[1, 31:] = 1 if left else 0
            found = model(ids, attention_mask=mask).logits
            torch.testing.assert_close(found[0], alone[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(found[1, 9:] if left else found[1, :31], alone[1], rtol=0, atol=1e-5)
        monkeypatch.setattr(rows, "_ENTRIES", 40 * 4 * 7)
        torch.testing.assert_close(model(TOKENS[:1]).logits[0], alone[0], rtol=0, atol=1e-6)
    written = model.generate(TOKENS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    ids, cache = TOKENS[:1], None
    with torch.no_grad():
        for place in range(4):  # only the prompt is edited
            given = ids if cache is None else ids[:, -1:]
            answer = model(given, past_key_values=cache, use_cache=True)
            cache = answer.past_key_values
            if not place:
                torch.testing.assert_close(answer.logits[0], alone[0], rtol=0, atol=1e-5)
                patchattn.unpatch_model(model)  # later tokens attend as they do without the patch
            ids = torch.cat([ids, answer.logits[:, -1:].argmax(-1)], dim=1)
    assert written.tolist() == ids.tolist()


def test_packed_texts_have_bands_of_their_own(model: LlamaForCausalLM) -> None:
    patchattn.patch_model(model, "attention_transition", SETTINGS)
    numbers = torch.cat([torch.arange(40), torch.arange(31)])[None]
    with torch.no_grad():
        packed = torch.cat([TOKENS[:1], TOKENS[1:, :31]], dim=1)
        together = model(packed, position_ids=numbers, use_cache=False).logits[0]
        torch.testing.assert_close(together[:40], model(TOKENS[:1]).logits[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(together[40:], model(TOKENS[1:, :31]).logits[0], rtol=0, atol=1e-5)
    patchattn.unpatch_model(model)


def test_encoders_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="which T5ForConditionalGeneration reads with its encoder"):
        patchattn.patch_model(FAMILIES["t5"].make(), "attention_transition")
    with pytest.raises(NotImplementedError, match="bidirectional or cross: rows give attention to earlier tokens"):
        patchattn.patch_model(FAMILIES["bert"].make(), "attention_transition")
