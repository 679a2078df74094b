"""Caches of others: filled without a variant, which those that look at keys and last queries alone compress all the
same; and quantised ones, which none follows."""

import copy
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import QuantizedLayer

import patchattn
from patchattn.core.kv_caches import cache_argument
from patchattn.core.registry import variant_info
from patchattn.reading.eviction import ScoredEviction
from patchattn.reading.windows import WindowEviction

from .evictions import extended, fed, padded
from .long_context import tiny_llama

PROMPT, STEPS = 12, 3
WINDOW = {"window": 3, "kernel": 1}
SCORED: dict[str, type[ScoredEviction]] = {
    name: variant_info(name).variant
    for name in patchattn.list_variants("cache")
    if issubclass(variant_info(name).variant, ScoredEviction)
}
METHODS = {
    name: WINDOW if issubclass(variant, WindowEviction) else {}
    for name, variant in SCORED.items()
    if variant.window is not ScoredEviction.window
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2).eval()


@pytest.fixture(scope="module")
def prompt(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    ids, real = padded()
    new = torch.randint(3, 60, (3, STEPS), generator=torch.Generator().manual_seed(1))
    return torch.cat([ids, new], dim=1), extended(real, PROMPT + STEPS)


def kept(cache: DynamicCache) -> list[torch.Tensor]:
    return [layer.keys for layer in cache.layers]


@pytest.mark.parametrize("event", ["prompt", "chunk"])
@pytest.mark.parametrize("method", METHODS)
def test_the_end_of_a_prompt_is_enough(model: Any, prompt: Any, method: str, event: str) -> None:
    ids, real = prompt
    plain = DynamicCache(config=model.config)
    fed(model, plain, ids, real, [PROMPT - 4])
    before = [keys.clone() for keys in kept(plain)]
    sizes = [4, *[1] * STEPS]
    patchattn.patch_model(model, method, budget=6, event=event, **METHODS[method])
    try:
        shared, whole = copy.deepcopy(plain), DynamicCache(config=model.config)
        if event == "chunk":  # whose own prompt would be cut in its first part already
            found = fed(model, shared, ids, real, sizes)
            expected = fed(model, whole, ids, real, [PROMPT, *[1] * STEPS])[:, PROMPT - 4 :]
        else:
            found = fed(model, shared, ids, real, sizes)
            expected = fed(model, whole, ids, real, [PROMPT - 4, *sizes])[:, PROMPT - 4 :]
        assert all(keys.shape[2] < PROMPT + STEPS for keys in kept(shared))
        assert [keys.shape for keys in kept(shared)] == [keys.shape for keys in kept(whole)]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    finally:
        patchattn.unpatch_model(model)
    assert all(torch.equal(keys, old) for keys, old in zip(kept(plain), before, strict=True))


@pytest.mark.parametrize(
    ("method", "rows"),
    [("knorm", 1), ("snapkv", 2), ("tova", 1), *((name, PROMPT - 1) for name in SCORED if name not in METHODS)],
)
def test_too_little_of_a_prompt_is_refused(model: Any, prompt: Any, method: str, rows: int) -> None:
    ids, real = prompt
    cache = DynamicCache(config=model.config)
    fed(model, cache, ids, real, [PROMPT - rows])
    patchattn.patch_model(model, method, budget=6, **METHODS.get(method, {}))
    try:
        with pytest.raises(ValueError, match="was filled without it") as refusal:
            model(
                ids[:, PROMPT - rows : PROMPT], attention_mask=real[:, :PROMPT].long(), **cache_argument(model, cache)
            )
    finally:
        patchattn.unpatch_model(model)
    assert ("at least the last" in str(refusal.value)) == (method in METHODS)


class Halved(QuantizedLayer):
    """Stands for quanto's and HQQ's, which need packages of their own."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return tensor.half()

    def _dequantize(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float()


@pytest.mark.parametrize("method", [name for name in patchattn.list_variants("cache") if name != "a_vl"])
def test_quantised_caches_are_refused_by_name(model: Any, method: str) -> None:
    settings = variant_info(method).examples[0]
    patchattn.patch_model(model, method, settings)
    try:
        cache = Cache(layers=[Halved(), Halved()])
        says = rf"^{method}\(.* which Halved cannot follow: .* not a static or quantised one"
        with pytest.raises(NotImplementedError, match=says):
            model(torch.full((1, 12), 5), **cache_argument(model, cache))
    finally:
        patchattn.unpatch_model(model)
