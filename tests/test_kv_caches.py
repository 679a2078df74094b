"""kv caches are told by their type, whatever a release calls them."""

import inspect
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Cache, DynamicCache, EncoderDecoderCache

import patchattn
from patchattn.core.kv_caches import cache_argument, find_cache

from .families import FAMILIES


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "whisper"])
def test_a_model_takes_the_cache_that_it_gives_without_a_warning(family: str, recwarn: Any) -> None:
    model, inputs = FAMILIES[family].make(), FAMILIES[family].inputs()
    recwarn.clear()
    with torch.no_grad():
        given = model(**inputs, use_cache=True)
        cache = find_cache(given.values())
        assert isinstance(cache, Cache)
        again = model(**inputs, **cache_argument(model, cache), use_cache=True)
    assert find_cache(again.values()) is cache
    assert not [warning for warning in recwarn if issubclass(warning.category, FutureWarning)]


def test_a_name_of_its_own() -> None:
    class Model(nn.Module):
        config = None

        def forward(self, ids: torch.Tensor, memory: EncoderDecoderCache | None = None) -> None: ...

    cache = DynamicCache()
    assert cache_argument(Model(), cache) == {"memory": cache}
    assert find_cache([1, None, cache]) is cache
    assert find_cache([torch.zeros(1)]) is None


def test_a_model_without_a_cache() -> None:
    model = FAMILIES["vit"].make()
    assert not any("ache" in name for name in inspect.signature(model.forward).parameters)
    with pytest.raises(NotImplementedError, match=r"ViT.* takes no kv cache"):
        cache_argument(model, None)


def test_a_patched_model_keeps_its_parameter() -> None:
    model = FAMILIES["llama"].make()
    expected = cache_argument(model, None)
    assert cache_argument(patchattn.patch_model(model, "ssa"), None) == expected
