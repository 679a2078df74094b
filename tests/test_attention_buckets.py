"""Attention Buckets against models that were made with each rotary base, and the merge written out."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import patchattn
from patchattn.core.kv_caches import cache_argument

from .families import FAMILIES
from .reference import tiny_llama

BASES = (0.3, 2.5, 7.0)
IDS = torch.randint(3, 50, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(num_hidden_layers=2, max_position_embeddings=64)


def with_base(model: Any, multiple: float) -> Any:
    """A model of the same weights that rotates by another base."""
    config = copy.deepcopy(model.config)
    config.rope_parameters["rope_theta"] *= multiple
    other = type(model)(config).double().eval()
    other.load_state_dict(model.state_dict())
    return other


def merged(every: list[np.ndarray]) -> np.ndarray:
    """Of logits `(T, V)` of each base."""
    output = np.zeros_like(every[0])
    for token in range(len(output)):
        largest = [logits[token].max() for logits in every]
        weights = np.exp(np.array(largest) - max(largest))
        for weight, logits in zip(weights / weights.sum(), every, strict=True):
            output[token] += weight * logits[token]
    return output


def expected(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """`(T, V)` of one sequence."""
    with torch.no_grad():
        every = [with_base(model, multiple)(ids[None]).logits[0].numpy() for multiple in (1.0, *BASES)]
    return torch.from_numpy(merged(every))


def test_the_merge_by_hand() -> None:
    found = merged([np.array([[2.0, 0.0]]), np.array([[1.0, 3.0]])])
    np.testing.assert_allclose(found, [[1.2689, 2.1932]], atol=1e-4)


def test_models_of_each_base(model: Any) -> None:
    want = expected(model, IDS[0])
    with torch.no_grad():
        plain = model(IDS[:1]).logits[0]
        with patchattn.patched(model, "attention_buckets", bases=BASES):
            found = model(IDS[:1]).logits[0]
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    assert (plain - want).abs().max() > 1e-3


def test_padding_caches_and_beams(model: Any) -> None:
    """The second sequence is padded by five, with and without position ids."""
    want = [expected(model, IDS[0]), expected(model, IDS[1, 5:])]
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[1, :5], mask[1, :5] = 0, 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with patchattn.patched(model, "attention_buckets", bases=BASES), torch.no_grad():
        founds = [model(ids, attention_mask=mask).logits, model(ids, attention_mask=mask, position_ids=places).logits]
        cache, parts, done = DynamicCache(), [], 0
        for size in (9, 12, 1, 1, 1):
            done += size
            given = {"attention_mask": mask[:, :done], "position_ids": places[:, done - size : done]}
            parts.append(model(ids[:, done - size : done], **given, **cache_argument(model, cache)).logits)
        founds.append(torch.cat(parts, dim=1))
        how = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
        assert torch.equal(model.generate(ids, **how), model.generate(ids, use_cache=False, **how))
    for found in founds:
        torch.testing.assert_close(found[0], want[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1, 5:], want[1], rtol=1e-5, atol=1e-5)


def test_bases_of_one_are_the_model_itself(model: Any) -> None:
    with torch.no_grad():
        plain = model(IDS).logits
        with patchattn.patched(model, "attention_buckets", bases=(1.0, 1.0)):
            torch.testing.assert_close(model(IDS).logits, plain, rtol=1e-6, atol=1e-6)


def test_what_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"attention_buckets must know how .* are learned"):
        patchattn.patch_model(FAMILIES["gpt2"].make(), "attention_buckets")
    with pytest.raises(ValueError, match="bases must lie between"):
        patchattn.patch_model(FAMILIES["llama"].make(), "attention_buckets", bases=(0.0,))
