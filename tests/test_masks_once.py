"""Layers of one forward that are called alike share their mask; none takes one that is about something else."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import patchattn
from patchattn.core.run import current_run
from patchattn.hosts.transformers import masks

from .reference import tiny_llama

SSMAX = {"initial_scale": 1.0, "bias": False}  # the temperature is the logarithm of the number of keys a query sees
TOKENS = torch.arange(3, 13)[None]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Which masks were read off what a model passed."""
    found: list[Any] = []
    original = masks._read

    def noted(given: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(given)
        return original(given, *args, **kwargs)

    monkeypatch.setattr(masks, "_read", noted)
    return found


def seen_by_layer(model: nn.Module, run: Callable[[], Any]) -> list[list[int]]:
    """How many keys each query of one sequence sees, layer by layer, as SSMax says."""
    found: list[list[int]] = []
    with patchattn.observe(
        model, lambda o: found.append(o.values["query_temperature"][0, :, 0].exp().round().tolist())
    ):
        run()
    return [[int(count) for count in row] for row in found]


@pytest.mark.parametrize(
    ("variant", "settings", "reads"),
    [("ssmax", {}, 1), ("moh", {}, 1), ("logn", {"train_length": 4}, 1), ("ssa", {}, 1)],
)
def test_a_mask_is_read_once_a_forward(variant: str, settings: dict[str, Any], reads: int, read: list[Any]) -> None:
    """SSA's keys and values are told of the one that its queries get, on their way into the cache already."""
    model = patchattn.patch_model(tiny_llama(num_hidden_layers=4), variant, settings)
    cache = tf.DynamicCache(config=model.config)
    with torch.no_grad():
        model(TOKENS, past_key_values=cache)
        for _ in range(3):
            read.clear()
            model(TOKENS[:, :1], past_key_values=cache)
            assert len(read) == reads
        model(TOKENS, attention_mask=torch.ones_like(TOKENS).index_fill(1, torch.tensor([0]), 0))
    assert not current_run().masks


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_layers_of_two_kinds(mode: Callable[[], AbstractContextManager[None]]) -> None:
    window = 4
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = tf.Gemma2Config(**sizes, head_dim=8, vocab_size=50, num_hidden_layers=4, layer_types=kinds)
    config.sliding_window = window
    model = patchattn.patch_model(tf.Gemma2ForCausalLM(config).eval(), "ssmax", SSMAX)
    count = TOKENS.shape[1]
    full = [query + 1 for query in range(count)]
    sliding = [min(query + 1, window) for query in range(count)]
    with mode():
        assert seen_by_layer(model, lambda: model(TOKENS)) == 2 * [sliding, full]
        cache = tf.DynamicCache(config=model.config)
        model(TOKENS, past_key_values=cache)
        found = seen_by_layer(model, lambda: model(TOKENS[:, :1], past_key_values=cache))
        assert found == 2 * [[window], [count + 1]]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mask_that_is_changed_in_place(mode: Callable[[], AbstractContextManager[None]]) -> None:
    """Between two forwards, and between two layers of one."""
    model = patchattn.patch_model(tiny_llama(num_hidden_layers=4), "ssmax", SSMAX)
    count = TOKENS.shape[1]
    with mode():
        mask = torch.ones(1, 1, count, count, dtype=torch.bool).tril()

        def hide(*_: Any) -> None:
            mask[..., 2:, 1] = False

        full = [query + 1 for query in range(count)]
        fewer = [query + 1 if query < 2 else query for query in range(count)]
        assert seen_by_layer(model, lambda: model(TOKENS, attention_mask=mask)) == 4 * [full]
        handle = model.model.layers[2].register_forward_pre_hook(hide)
        assert seen_by_layer(model, lambda: model(TOKENS, attention_mask=mask)) == [full, full, fewer, fewer]
        handle.remove()
        assert seen_by_layer(model, lambda: model(TOKENS, attention_mask=mask)) == 4 * [fewer]


def test_masks_that_come_and_go() -> None:
    """Each layer is given a mask of its own, at whose place in memory there may have been another one."""
    model = patchattn.patch_model(tiny_llama(num_hidden_layers=8), "ssmax", SSMAX)
    count = TOKENS.shape[1]

    def shorten(layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            mask = torch.ones(1, 1, count, count, dtype=torch.bool).tril()
            mask[..., layer + 1 :, :layer] = False
            return args, {**kwargs, "attention_mask": mask}

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(shorten(index), with_kwargs=True)
    with torch.no_grad():
        found = seen_by_layer(model, lambda: model(TOKENS))
    assert found == [[q + 1 if q <= index else q + 1 - index for q in range(count)] for index in range(8)]


def test_gradients_where_layers_are_run_again() -> None:
    """Checkpointing runs layers again behind the forward, whose masks are gone."""

    def gradients(checkpoints: bool) -> list[torch.Tensor]:
        model = patchattn.patch_model(tiny_llama(num_hidden_layers=3), "ssmax", SSMAX).train()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    for ours, plain in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
