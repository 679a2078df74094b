"""torch.compile of patched models, over every registered variant; none is named. These tests take seconds each."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.exc import InternalTorchDynamoError
from transformers import StaticCache

import patchattn
from patchattn.core.kv_caches import cache_argument

from .behaviour import Case, decoded, on, text, variants_in, without_dropout
from .families import FAMILIES, LENGTH, outputs, shortened
from .toys import TOYS

# The toys, and those that say that they cannot be compiled.
LEFT_OUT = {*TOYS, *(n for n in patchattn.list_variants() if "compile" not in patchattn.variant_info(n).capabilities)}
pytestmark = pytest.mark.usefixtures("toys")


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: torch.nn.Module, backend: str = "aot_eager") -> Any:
    return torch.compile(model, fullgraph=True, backend=backend)


def small(family: str, case: Case) -> torch.nn.Module:
    """The model of a family, with as many of its layers as the settings name, or read, if it is one of text."""
    named = [layer for _, value in case.settings if isinstance(value, dict) for layer in value if layer != "all"]
    named += [depth + 1 for name, value in case.settings if name == "depths" for depth in value]
    model = FAMILIES[family].make()
    if FAMILIES[family].kind == "multimodal":  # which read the layer before the last of their vision tower
        return model
    return shortened(model, 1 + max(named, default=0))


@functools.cache
def trains_compiled(family: str) -> bool:
    """Whether this release of torch compiles a training step of the unpatched model: 2.11 does not that of LLaVA."""
    model, inputs = FAMILIES[family].make().train(), FAMILIES[family].inputs()
    outputs(model, **inputs)
    try:
        compiled(model)(**inputs).logits.mean().backward()
    except InternalTorchDynamoError:
        return False
    return True


def with_compiled_layers(model: torch.nn.Module) -> torch.nn.Module:
    """The model with each of its layers that has a variant compiled by itself, in place: half the work of the whole
    model."""
    stacks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    layers = [layer for stack in stacks for layer in stack if variants_in(layer)]
    assert layers
    for layer in layers:
        layer.compile(fullgraph=True, backend="eager")
    return model


def trains_alike(family: str, case: Case, compiler: Callable[[torch.nn.Module], Any]) -> None:
    """A step of training computes what it does uncompiled."""
    results = []
    for wrapped in (lambda model: model, compiler):
        model, inputs = small(family, case), FAMILIES[family].inputs()
        without_dropout(model)
        case.patch(model).train()
        outputs(model, **inputs)  # in the first forward transformers installs hooks, which is not compiled
        output = wrapped(model)(**inputs).logits
        output.pow(2).mean().backward()
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
        results.append({**gradients, "output": output})
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-4, atol=1e-5)


@on(["llama", "bert", "vit", "llava"], once=True, first=True, without=LEFT_OUT)
def test_training_compiles_without_graph_breaks(family: str, case: Case) -> None:
    """What a paper's variant does, which it does in layers; around them it does what toys do, compiled below."""
    if FAMILIES[family].kind != "multimodal":
        trains_alike(family, case, with_compiled_layers)
    elif not trains_compiled(family):
        pytest.skip("the installed torch does not compile this model's training unpatched")
    else:  # whose vision tower's layers cannot be compiled one by one unpatched: transformers records what they give
        trains_alike(family, case, functools.partial(compiled, backend="eager"))


@on(["llama", "bert", "llava"], once=True, papers=0)
def test_training_compiles_with_its_gradients(family: str, case: Case) -> None:
    if not trains_compiled(family):
        pytest.skip("the installed torch does not compile this model's training unpatched")
    trains_alike(family, case, functools.partial(compiled, backend="aot_eager"))


@on(["llama", "qwen3", "gpt2"], once=True, papers=0)
def test_a_step_on_a_static_cache_compiles_without_graph_breaks(family: str, case: Case) -> None:
    model, tokens = case.patch(small(family, case)), text()
    cache = StaticCache(config=model.config, max_cache_len=16)
    outputs(model, input_ids=tokens[:, :-1], **cache_argument(model, cache))
    step = outputs(compiled(model), input_ids=tokens[:, -1:], **cache_argument(model, cache))[0]
    expected = outputs(model, input_ids=tokens)[0]
    if case.looks_ahead:
        expected = decoded(model, tokens, [LENGTH - 1, 1])
    torch.testing.assert_close(step, expected[:, -1:], rtol=1e-4, atol=1e-4)


@on(["llama", "qwen3", "gpt2"], once=True, papers=0, without=("toy_gate", "toy_rule", "toy_state"))
def test_a_compiled_model_is_patched_and_unpatched(family: str, case: Case) -> None:
    """torch.compile first, patch later: the compiled code follows. What is left out stands where toy_mask stands."""
    model, tokens = small(family, case), text()
    base, outer = outputs(model, input_ids=tokens)[0], compiled(model, backend="eager")
    torch.testing.assert_close(outputs(outer, input_ids=tokens)[0], base, rtol=1e-5, atol=1e-5)
    case.patch(outer)
    expected = outputs(model, input_ids=tokens)[0]
    torch.testing.assert_close(outputs(outer, input_ids=tokens)[0], expected, rtol=1e-5, atol=1e-5)
    patchattn.unpatch_model(outer)
    torch.testing.assert_close(outputs(outer, input_ids=tokens)[0], base, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@on(["llama", "bert"])
def test_compiles_with_inductor(family: str, case: Case) -> None:
    model, inputs = case.patch(FAMILIES[family].make()), FAMILIES[family].inputs()
    expected = outputs(model, **inputs)
    for left, right in zip(expected, outputs(torch.compile(model, fullgraph=True), **inputs), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
