"""Hooks of a patched model: their order among others, and what outlives a call, a failure and the patch itself."""

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import patchattn
from patchattn.core import context, run
from patchattn.core.kv_caches import cache_argument
from patchattn.vision import latest

from .behaviour import assert_same, randomise, snapshot
from .families import FAMILIES, outputs

PATCHES = [
    ("moh", {"router": "learned", "active_ratio": 0.5, "shared_ratio": 0.0, "router_std": 1.0}),
    ("ssa", {}),
    ("shrp", {}),
]

VAR = dict(patchattn.variant_info("var").examples[0])


@pytest.fixture
def tokens() -> torch.Tensor:
    return FAMILIES["llama"].inputs()["input_ids"]


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Only counted references free anything."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def steer(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if args:
        return (args[0] + 0.5, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + 0.5}


def attention_modules(model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule(row["name"]) for row in patchattn.patch_info(model)["sites"]]


@pytest.mark.parametrize("family", ["llama", "qwen3", "bert", "gpt2"])
@pytest.mark.parametrize(("variant", "settings"), PATCHES)
def test_a_hook_placed_later_changes_what_variants_read(family, variant, settings) -> None:
    """Steering before or after patching is the same model."""
    if variant == "shrp" and family != "bert":
        pytest.skip("shrp is for encoders")
    inputs, found = FAMILIES[family].inputs(), []
    for first in ("steer", "patch"):
        model = FAMILIES[family].make()
        handles = []
        for step in (first, "patch" if first == "steer" else "steer"):
            if step == "patch":
                torch.manual_seed(0)
                patchattn.patch_model(model, variant, **settings)
                randomise(model)
            else:
                handles = [m.register_forward_pre_hook(steer, with_kwargs=True) for m in attention_modules(model)]
        found.append(outputs(model, **inputs)[0])
        for handle in handles:
            handle.remove()
        assert not torch.equal(outputs(model, **inputs)[0], found[-1])
    assert torch.equal(*found)


def test_a_hook_on_a_query_norm_placed_later_changes_what_is_read(tokens) -> None:
    found = []
    for patch_first in (True, False):
        model = FAMILIES["qwen3"].make()
        if patch_first:
            patchattn.patch_model(model, "moh", router="query_norm", active_ratio=0.5, shared_ratio=0.0)
        for layer in model.model.layers:
            layer.self_attn.q_norm.register_forward_pre_hook(lambda module, args: (args[0] * torch.arange(8),))
        if not patch_first:
            patchattn.patch_model(model, "moh", router="query_norm", active_ratio=0.5, shared_ratio=0.0)
        found.append(outputs(model, input_ids=tokens)[0])
    assert torch.equal(*found)


def test_later_hooks_survive_copies_pickles_and_unpatching(tokens) -> None:
    model = patchattn.patch_model(FAMILIES["llama"].make(), "ssa")
    randomise(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for layer in other.model.layers:
            layer.self_attn.register_forward_pre_hook(steer, with_kwargs=True)
        changed = outputs(other, input_ids=tokens)[0]
        plain = FAMILIES["llama"].make()
        for layer in plain.model.layers:
            layer.self_attn.register_forward_pre_hook(steer, with_kwargs=True)
        before = snapshot(plain)
        patchattn.patch_model(plain, "ssa")
        randomise(plain)
        assert torch.equal(outputs(plain, input_ids=tokens)[0], changed)
        patchattn.unpatch_model(plain)
        assert_same(before, snapshot(plain))
        steered = outputs(plain, input_ids=tokens)[0]
        assert torch.equal(outputs(patchattn.unpatch_model(other), input_ids=tokens)[0], steered)


def test_a_hook_that_goes_around_the_order_is_refused_once(tokens) -> None:
    model = patchattn.patch_model(FAMILIES["llama"].make(), "ssa")
    randomise(model)
    for layer in model.model.layers[:1]:
        nn.Module.register_forward_pre_hook(layer.self_attn, steer, with_kwargs=True)
    with pytest.raises(RuntimeError, match="by other means than its own register_forward_pre_hook"):
        model(tokens)
    found = outputs(model, input_ids=tokens)[0]
    other = FAMILIES["llama"].make()
    other.model.layers[0].self_attn.register_forward_pre_hook(steer, with_kwargs=True)
    patchattn.patch_model(other, "ssa")
    randomise(other)
    assert torch.equal(outputs(other, input_ids=tokens)[0], found)


@pytest.mark.parametrize("variant", ["ssa", "act", "moh", "logn", "var"])
def test_a_call_leaves_nothing_behind(variant, no_collector) -> None:
    family = FAMILIES["llava" if variant == "var" else "llama"]
    inputs = family.inputs()
    model = patchattn.patch_model(family.make(), variant, **(VAR if variant == "var" else {}))
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model(**inputs, **cache_argument(model, cache))
        model(input_ids=inputs["input_ids"][:, :1], **cache_argument(model, cache))
    held, keys = weakref.ref(cache), weakref.ref(cache.layers[0].keys)
    del cache
    assert held() is None
    assert keys() is None


class Failing(nn.Module):
    """An output projection that fails, as one does that is out of memory."""

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        raise MemoryError


@pytest.mark.parametrize("variant", ["ssa", "act", "moh", "var"])
def test_a_failure_within_attention_leaves_nothing_behind(variant, no_collector) -> None:
    family = FAMILIES["llava" if variant == "var" else "llama"]
    inputs = {name: tensor.clone() for name, tensor in family.inputs().items()}
    model = family.make()
    decoder = model.get_decoder()
    settings = {"var": VAR, "moh": {"router": "learned"}}.get(variant, {})
    patchattn.patch_model(model, variant, **settings)
    decoder.layers[1].self_attn.o_proj = Failing()
    cache = DynamicCache(config=model.config.get_text_config())
    try:
        model(**inputs, **cache_argument(model, cache))
    except MemoryError:
        pass
    else:
        pytest.fail("nothing failed")
    found = [weakref.ref(x) for x in (cache, inputs["input_ids"], decoder.layers[1].self_attn)]
    del cache, inputs, decoder
    assert found[0]() is None
    assert found[1]() is None
    patchattn.unpatch_model(model)
    del model
    assert found[2]() is None
    for module in (context, run):
        assert not any(vars(module._local).values())


@pytest.mark.parametrize("variant", ["var", "damro"])
@pytest.mark.parametrize("place", ["model.multi_modal_projector", "model.language_model.norm", "lm_head", None])
def test_no_forward_leaves_token_ids_or_pictures(variant, place, no_collector) -> None:
    """It may fail before the language model, in it or after it, or not at all."""
    vars(latest._local).clear()  # a forward that succeeds leaves them
    family = FAMILIES["llava"]
    inputs = {name: tensor.clone() for name, tensor in family.inputs().items()}
    model = patchattn.patch_model(family.make(), variant, **(VAR if variant == "var" else {}))
    if place is not None:
        parent, _, child = place.rpartition(".")
        setattr(model.get_submodule(parent), child, Failing())
    try:
        with torch.no_grad():
            model(**inputs)
    except MemoryError:
        pass
    else:
        assert place is None
    kept = [weakref.ref(tensor) for tensor in inputs.values()]
    del inputs
    assert [tensor() for tensor in kept] == [None, None]
    for noted in (run._local, *([] if place is None else [latest._local])):
        assert not any(vars(noted).values())
