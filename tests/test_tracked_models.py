"""Models whose cache layers append in place give what they give with transformers' own, to the bit."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import patchattn
from patchattn.cache.memory import held_bytes
from patchattn.cache.tracked import TrackedLayer
from patchattn.core.kv_caches import cache_argument
from patchattn.core.registry import temporarily_registered

from .families import FAMILIES, outputs
from .toy import ToyConfig


class Follow(patchattn.Variant):
    """Changes nothing and notes a number of every key, so that the layers of the cache are followed."""

    config_class = ToyConfig
    keeps_state = True

    def attend(self, call: Any, inner: Any) -> Any:
        state = call.context.sequence_state("follow")
        if state is not None:
            state.write("first", call.key[..., 0].clone(), per_key=True)
        return inner(call)


@pytest.fixture(autouse=True)
def follow() -> Iterator[str]:
    words = {"title": "", "summary": "", "extra_parameters": "", "arxiv_id": None, "year": 2026}
    info = patchattn.VariantInfo(name="follow", variant=Follow, needs_training=False, **words)
    with temporarily_registered(info) as name:
        yield name


def prompt(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(0))


def run(model: Any, cache: Any, *chunks: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return [outputs(model, input_ids=chunk, **cache_argument(model, cache))[0] for chunk in chunks]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_cached_forwards_are_equal_to_the_bit(family: str, implementation: str) -> None:
    model = FAMILIES[family].make_exact()
    model.set_attn_implementation(implementation)
    chunks = prompt().split([3, 1, 1, 2, 1, 1], dim=1)
    expected = run(model, DynamicCache(config=model.config), *chunks)
    patchattn.patch_model(model, "follow")
    cache = DynamicCache(config=model.config)
    for ours, theirs in zip(run(model, cache, *chunks), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert any(isinstance(layer, TrackedLayer) and layer.room is not None for layer in cache.layers)
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held_bytes(cache) > 2 * size  # a few tokens, and the spare places of hundreds


def two_turns(model: Any, patched: bool, **how: Any) -> list[torch.Tensor]:
    """Tokens of a prompt, and of a second one that goes on from its cache, and from a copy of that."""
    if patched:
        patchattn.patch_model(model, "follow")
    cache = DynamicCache(config=model.config)
    ids = prompt(1 if "prompt_lookup_num_tokens" in how else 2)
    first = model.generate(ids, max_new_tokens=12, **how, **cache_argument(model, cache))
    turn, twin = torch.cat([first[:, :-1], prompt(len(first), 3)], dim=1), copy.deepcopy(cache)
    if "num_beams" in how:  # whose cache is not that of the sequences returned
        return [first]
    seconds = [model.generate(turn, max_new_tokens=5, **how, **cache_argument(model, each)) for each in (twin, cache)]
    assert torch.equal(*seconds)
    return [first, seconds[0]]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"prefill_chunk_size": 4},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=["greedy", "beams", "several", "chunks", "prompt_lookup"],
)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_generated_tokens_are_the_same(family: str, settings: dict[str, Any]) -> None:
    how = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, **settings}
    found = [two_turns(FAMILIES[family].make_exact(), patched, **how) for patched in (False, True)]
    assert all(map(torch.equal, *found))


def test_a_patch_that_comes_off_leaves_a_cache_that_goes_on() -> None:
    model = FAMILIES["llama"].make_exact()
    chunks = prompt().split([5, 1, 1, 1, 1], dim=1)
    expected = run(model, DynamicCache(config=model.config), *chunks)
    patchattn.patch_model(model, "follow")
    cache = DynamicCache(config=model.config)
    found = run(model, cache, *chunks[:3])
    patchattn.unpatch_model(model)
    assert all(map(torch.equal, [*found, *run(model, cache, *chunks[3:])], expected))


def test_ssa_stores_what_it_scales_without_copies() -> None:
    model = patchattn.patch_model(FAMILIES["llama"].make_exact(), "ssa")
    cache = DynamicCache(config=model.config)
    run(model, cache, *prompt().split([7, 2], dim=1))
    place = cache.layers[0].keys.untyped_storage().data_ptr()
    found = run(model, cache, *prompt(2, 3).split(1, dim=1))
    assert cache.layers[0].keys.untyped_storage().data_ptr() == place
    uncached = outputs(model, input_ids=torch.cat([prompt(), prompt(2, 3)], dim=1), use_cache=False)[0]
    torch.testing.assert_close(torch.cat(found, dim=1), uncached[:, 9:])
