"""Tokens taken back out of a kv cache: by assisted decoding, and by hand."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

import patchattn
from patchattn.core.kv_caches import cache_argument

from . import vlms
from .test_decoding import extended

SETTINGS: dict[str, dict[str, Any]] = {
    "damro": {"top_k": 2},
    "var": {
        "sink_dims": (3, 17),
        "sink_threshold": 1.0,
        "max_sink_share": 0.9,
        "min_image_share": 0.1,
        "first_layer": 0,
        "except_last": False,
    },
}
VARIANTS = pytest.mark.parametrize("variant", list(SETTINGS))


def patched(name: str, variant: str) -> tuple[Any, dict[str, torch.Tensor]]:
    model = patchattn.patch_model(vlms.make(name, dtype=torch.float64), variant, SETTINGS[variant])
    return model, vlms.inputs(name, rows=1, dtype=torch.float64)


@contextmanager
def as_the_release_can(model: Any) -> Iterator[None]:
    """Older releases of transformers crop no static cache, hand pictures to an assistant, and count wrong."""
    with patchattn.unpatched(model):
        try:
            yield
        except (AttributeError, RuntimeError, ValueError) as error:
            pytest.skip(f"not without patchattn either: {error}")


@pytest.mark.parametrize("helper", ["prompt_lookup", "assistant"])
@pytest.mark.parametrize("name", ["llava", "llava_sliding"])
@VARIANTS
def test_assisted_decoding_is_plain_decoding(variant: str, name: str, helper: str) -> None:
    model, given = patched(name, variant)
    settings: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False}
    plain = model.generate(**given, **settings)
    if helper == "prompt_lookup":
        settings["prompt_lookup_num_tokens"] = 3
    else:
        torch.manual_seed(5)
        text = model.config.text_config
        sizes = {name: getattr(text, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
        draft = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2))
        draft.generation_config.eos_token_id = None
        settings["assistant_model"] = draft.double().eval()
    with as_the_release_can(model):
        model.generate(**given, **settings)
    assert torch.equal(model.generate(**given, **settings), plain)


def step(model: Any, cache: Any, tokens: list[int], **given: Any) -> torch.Tensor:
    """`(V,)` logits behind more tokens of one sequence."""
    ids = torch.tensor([tokens])
    mask = torch.ones(1, int(cache.get_seq_length()) + len(tokens), dtype=torch.long)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **given, **cache_argument(model, cache)).logits[0, -1]


def taken_back(model: Any, kind: str, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """`(V,)` logits behind the prompt, 30 and 31, after others were taken back."""
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=40)
    cache.activate_past_recording()
    step(model, cache, given["input_ids"][0].tolist(), pixel_values=given["pixel_values"])
    step(model, cache, [7])
    cache.crop(-1)
    step(model, cache, [4, 5])
    step(model, cache, [9])
    cache.crop(-3)
    step(model, cache, [30])
    return step(model, cache, [31])


@pytest.mark.parametrize("name", ["llava", "llava_sliding"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@VARIANTS
def test_what_is_taken_back_leaves_no_trace(variant: str, kind: str, name: str) -> None:
    if kind == "static" and (variant == "damro" or name == "llava_sliding"):
        pytest.skip("refused, see below")
    model, given = patched(name, variant)
    with as_the_release_can(model):
        taken_back(model, kind, given)
    got = taken_back(model, kind, given)
    with torch.no_grad():
        whole = model(**extended(given, torch.tensor([[30, 31]])), use_cache=False).logits[0, -1]
    torch.testing.assert_close(got, whole, rtol=1e-5, atol=1e-5)


def test_what_a_full_static_window_has_pushed_out_is_not_taken_back() -> None:
    model, given = patched("llava_sliding", "var")
    cache = StaticCache(model.config, max_cache_len=40)
    step(model, cache, given["input_ids"][0].tolist(), pixel_values=given["pixel_values"])
    with pytest.raises(NotImplementedError, match="cannot take back the last 1 tokens of a static sliding cache"):
        cache.crop(-1)


def test_marks_of_slots_that_are_empty_again_are_gone() -> None:
    model, given = patched("llava", "var")
    cache = StaticCache(model.config, max_cache_len=40)
    step(model, cache, given["input_ids"][0].tolist(), pixel_values=given["pixel_values"])
    kept, removed = 6, given["input_ids"].shape[1] - 6
    if not hasattr(StaticLayer, "crop"):
        pytest.skip("this release of transformers crops no static cache")
    cache.crop(-removed)
    (state,) = cache.layers[0].sequence_states.values()
    assert state.per_key["var.image"][0, 0].tolist() == [False, False, True, True, True, True] + [False] * (40 - kept)
