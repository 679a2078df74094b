"""Hepos against cross attention written out in float64, head by head."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

import patchattn
from patchattn.core.kv_caches import cache_argument

from .families import FAMILIES

SOURCE = torch.randint(4, 60, (3, 7), generator=torch.Generator().manual_seed(1))
TARGET = torch.randint(4, 60, (3, 4), generator=torch.Generator().manual_seed(2))
REAL = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [0] * 5 + [1] * 2])  # two tokens are fewer than the stride
INPUTS = {"input_ids": SOURCE, "attention_mask": REAL, "decoder_input_ids": TARGET}


def read(number: int, head: int, length: int, stride: int) -> bool:
    """Whether a head reads a token of a source, by their numbers."""
    stride = min(stride, length)
    return number % stride == head % stride


def by_loops(module: Any, states: np.ndarray, memory: np.ndarray, stride: int) -> np.ndarray:
    """Output `(B, T, E)` of cross attention to `(B, S, E)`."""

    def projected(name: str, x: np.ndarray) -> np.ndarray:
        part = getattr(module, name)
        return x @ part.weight.detach().numpy().T + part.bias.detach().numpy()

    heads = module.num_heads
    query = projected("q_proj", states).reshape(*states.shape[:2], heads, -1)
    key, value = (projected(name, memory).reshape(*memory.shape[:2], heads, -1) for name in ("k_proj", "v_proj"))
    output = np.zeros_like(query)
    for row, token, head in np.ndindex(*query.shape[:3]):
        places = [place for place in range(memory.shape[1]) if REAL[row, place]]
        places = [place for number, place in enumerate(places) if read(number, head, len(places), stride)]
        logits = key[row, places, head] @ query[row, token, head] / query.shape[-1] ** 0.5
        weights = np.exp(logits - logits.max())
        output[row, token, head] = weights / weights.sum() @ value[row, places, head]
    return projected("out_proj", output.reshape(*states.shape[:2], -1))


def test_which_tokens_heads_read() -> None:
    assert [[j for j in range(5) if read(j, head, 5, 2)] for head in range(2)] == [[0, 2, 4], [1, 3]]


@pytest.mark.parametrize("stride", [2, 4])
def test_heads_written_out(stride: int) -> None:
    model: Any = patchattn.patch_model(FAMILIES["bart"].make_exact(), "hepos", stride=stride)
    module, seen = model.model.decoder.layers[0].encoder_attn, {}

    def keep(_: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        given = [*args, *(value for value in kwargs.values() if isinstance(value, torch.Tensor) and value.dim() == 3)]
        seen.update(states=given[0], memory=given[1], output=output[0])

    handle = module.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(**INPUTS)
    handle.remove()
    states, memory, found = (seen[name].numpy() for name in ("states", "memory", "output"))
    np.testing.assert_allclose(found, by_loops(module, states, memory, stride), atol=1e-9)
    assert np.abs(found - by_loops(module, states, memory, 1)).max() > 1e-3


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_token_by_token(family: str) -> None:
    model: Any = patchattn.patch_model(FAMILIES[family].make_exact(), "hepos")
    cache, parts = EncoderDecoderCache(DynamicCache(), DynamicCache()), []
    with torch.no_grad():
        expected = model(**INPUTS, use_cache=False).logits
        memory = model.get_encoder()(SOURCE, attention_mask=REAL)
        for token in TARGET.split(1, dim=1):
            given = {"encoder_outputs": memory, "attention_mask": REAL, "decoder_input_ids": token}
            parts.append(model(**given, **cache_argument(model, cache), use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-9, atol=1e-9)
    how = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2}
    inputs = {"input_ids": SOURCE, "attention_mask": REAL}
    assert torch.equal(model.generate(**inputs, **how), model.generate(**inputs, **how, use_cache=False))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="has 4 heads, got stride=3"):
        patchattn.patch_model(FAMILIES["bart"].make(), "hepos", stride=3)
    for family in ("llama", "bert"):
        with pytest.raises(NotImplementedError, match="divides a source among the heads of cross attention"):
            patchattn.patch_model(FAMILIES[family].make(), "hepos")
