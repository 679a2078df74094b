"""State along a sequence: what a variant notes of a key it finds again at that key, whatever happens to the cache."""

import copy
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import patchattn
from patchattn.cache.state import SequenceState
from patchattn.cache.tracked import sequence_state
from patchattn.core.kv_caches import cache_argument
from patchattn.core.registry import temporarily_registered

from .families import FAMILIES, outputs
from .toy import ToyConfig

SEEN: list[int] = []  # keys compared per call


@dataclass(frozen=True, kw_only=True)
class StampConfig(ToyConfig):
    rewinds: bool = patchattn.option(True, help="Whether the state can be cropped.", source="ours")


class Stamp(patchattn.Variant):
    """Remembers a number of every key when it comes, and finds the same number there ever after."""

    config_class = StampConfig
    keeps_state = True

    def attend(self, call: Any, inner: Any) -> Any:
        state = call.context.sequence_state("stamp", rewinds=self.config.rewinds)
        if state is not None:
            stamp, now = state.per_key.get("stamp"), call.key[:, :, :, 0].clone()  # a static cache writes into its own
            if stamp is not None:
                assert stamp.shape == now.shape
                old = stamp != 0
                assert torch.equal(stamp[old], now[old])
                SEEN.append(int(old[0, 0].sum()))
            state.write("stamp", now, per_key=True)
            first = state.tensors.get("first", now.amax(dim=(1, 2)) * 0 + call.value[:, 0, 0, 0])
            state.write("first", first)
        return inner(call)


@pytest.fixture(autouse=True)
def stamp() -> Iterator[str]:
    SEEN.clear()
    facts = {"title": "", "summary": "", "extra_parameters": "", "arxiv_id": None, "year": 2026}
    info = patchattn.VariantInfo(name="stamp", variant=Stamp, needs_training=False, **facts)
    with temporarily_registered(info) as name:
        yield name


def model_of(family: str, **settings: Any) -> Any:
    return patchattn.patch_model(FAMILIES[family].make_exact(), "stamp", **settings)


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(0))


def layer_of(cache: Any, index: int = 0) -> Any:
    return cache.layers[index]


@pytest.mark.parametrize("chunks", [[3, 1, 1, 3, 1], [1] * 9, [7, 1, 1], [2, 6, 1]], ids=str)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_stamps_stay_at_their_keys(family: str, kind: str, chunks: list[int]) -> None:
    model = model_of(family)
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=12)
    for chunk in tokens().split(chunks, dim=1):
        outputs(model, input_ids=chunk, **cache_argument(model, cache))
    window = 3 if family == "mistral" else 9 - chunks[-1]
    assert SEEN[-1] == min(window, 9 - chunks[-1]) or family == "gemma3_text"


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "mistral", "t5"])
def test_stamps_follow_beams_and_a_second_generation(family: str, implementation: str) -> None:
    model = model_of(family)
    for _ in range(2):
        model.generate(
            tokens(),
            num_beams=3,
            do_sample=False,
            max_new_tokens=5,
            pad_token_id=0,
            cache_implementation=None if implementation == "dynamic" else "static",
            disable_compile=True,
        )
    assert SEEN


def filled(model: Any, length: int = 6) -> Any:
    cache = DynamicCache(config=model.config)
    outputs(model, input_ids=tokens()[:, :length], **cache_argument(model, cache))
    return cache


def test_stamps_follow_selection_repetition_and_reordering() -> None:
    model = model_of("llama")
    cache = filled(model)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    cache.batch_select_indices(torch.tensor([0, 3, 1]))
    expected = tokens()[[1, 1, 0], :6]  # rows 0 0 1 1, then 1 0 0 1, then 1 1 0
    fresh = DynamicCache(config=model.config)
    outputs(model, input_ids=expected, **cache_argument(model, fresh))
    for left, right in zip(cache.layers, fresh.layers, strict=True):
        (mine,), (other,) = left.sequence_states.values(), right.sequence_states.values()
        torch.testing.assert_close(mine.per_key["stamp"], other.per_key["stamp"])
        torch.testing.assert_close(mine.tensors["first"], other.tensors["first"])
    outputs(model, input_ids=tokens(3, 1), **cache_argument(model, cache))


def test_cropped_keys_are_forgotten_and_others_come() -> None:
    model = model_of("llama")
    cache = filled(model)
    cache.crop(-2)
    assert [state.per_key["stamp"].shape[-1] for state in layer_of(cache).sequence_states.values()] == [4]
    SEEN.clear()
    outputs(model, input_ids=tokens(2, 3), **cache_argument(model, cache))
    assert SEEN == [4, 4]


def test_a_sum_over_rows_refuses_to_be_cropped() -> None:
    cache = filled(model_of("llama", rewinds=False))
    cache.crop(0)
    with pytest.raises(NotImplementedError, match="cannot take back the last 2"):
        cache.crop(-2)
    assert cache.get_seq_length() == 6


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_reset_cache_starts_anew(kind: str) -> None:
    model = model_of("llama")
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=12)
    outputs(model, input_ids=tokens(), **cache_argument(model, cache))
    cache.reset()
    assert not layer_of(cache).sequence_states
    if kind == "static" or cache.get_seq_length() == 0:  # older versions of transformers keep a dynamic one's length
        outputs(model, input_ids=tokens(3, 4)[:2], **cache_argument(model, cache))
        assert len(layer_of(cache).sequence_states) == 1


def test_copies_of_a_cache_are_independent() -> None:
    model = model_of("llama")
    cache = filled(model)
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        outputs(model, input_ids=tokens(2, 2), **cache_argument(model, twin))
        assert twin.get_seq_length() == 8
        assert [state.per_key["stamp"].shape[-1] for state in layer_of(cache).sequence_states.values()] == [6]
        assert isinstance(layer_of(twin), type(DynamicCache(config=model.config).layers[0]))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_filled_without_the_variant_is_refused(kind: str) -> None:
    model = FAMILIES["llama"].make_exact()
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=12)
    outputs(model, input_ids=tokens(), **cache_argument(model, cache))
    patchattn.patch_model(model, "stamp")
    with pytest.raises(ValueError, match="9 cached tokens but knows of none"):
        outputs(model, input_ids=tokens(2, 1), **cache_argument(model, cache))


def test_a_cache_continued_without_the_variant_is_refused() -> None:
    model = model_of("llama")
    cache = filled(model)
    outputs(patchattn.unpatch_model(model), input_ids=tokens(2, 2), **cache_argument(model, cache))
    patchattn.patch_model(model, "stamp")
    with pytest.raises(ValueError, match="8 cached tokens but knows of 6"):
        outputs(model, input_ids=tokens(2, 1), **cache_argument(model, cache))


def test_cross_attention_finds_its_keys_again() -> None:
    model = model_of("bart")
    inputs = FAMILIES["bart"].inputs()
    decoder = inputs.pop("decoder_input_ids")
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    for chunk in decoder.split([2, 1, 3], dim=1):
        outputs(model, **inputs, decoder_input_ids=chunk, **cache_argument(model, cache))
    states = cache.cross_attention_cache.layers[0].sequence_states
    assert [state.per_key["stamp"].shape[-1] for state in states.values()] == [inputs["input_ids"].shape[1]]


def test_without_a_cache_there_is_no_state() -> None:
    outputs(model_of("llama"), input_ids=tokens(), use_cache=False)
    outputs(model_of("bert"), input_ids=tokens())
    assert not SEEN


def test_the_class_of_a_layer_with_state() -> None:
    registered = dict(tf.cache_utils.DYNAMIC_LAYER_TYPE_MAPPING)
    layers = [tf.cache_utils.DynamicLayer(), tf.cache_utils.DynamicSlidingWindowLayer(sliding_window=4)]
    for layer in layers:
        plain = type(layer)
        states = [sequence_state(layer, owner, rows=0, rewinds=True) for owner in "aba"]
        assert isinstance(layer, plain)
        assert states[0] is states[2]
        assert states[0] is not states[1]
    assert registered == tf.cache_utils.DYNAMIC_LAYER_TYPE_MAPPING


def test_gradients_are_not_remembered() -> None:
    state = SequenceState("me", True)
    state.write("x", torch.ones(2, requires_grad=True) * 2)
    assert not state.tensors["x"].requires_grad


def test_a_layer_that_keeps_its_keys_in_a_place_of_its_own_is_refused() -> None:
    layer = tf.cache_utils.DynamicLayer()
    layer.keys = torch.tensor([])
    state = SequenceState("me", True)
    with pytest.raises(
        NotImplementedError, match="me follows the keys of a cache, and DynamicLayer keeps 4 of them in a"
    ):
        state.align(layer, 4, 4)
