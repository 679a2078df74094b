"""What a patch costs while decoding, in calls of Python and operators of torch per layer and token: counted, not timed,
so that no busy machine changes it. Below what it once was, and above what is needed now, there is some room. Appending
to a kv cache in place is some ten calls and four operators of it, and saves copying the cache."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import patchattn

from .reference import HEADS, tiny_llama

LAYERS, STEPS = 4, 3
TOKENS = torch.arange(3, 11)[None]


class Operators(TorchDispatchMode):
    """Counts operators, those included that only look at a tensor in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def calls_of_python(run: Callable[[], None]) -> int:
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


def cost(model: nn.Module) -> tuple[float, float]:
    """Calls of Python and operators per layer and token, while decoding with a cache."""
    cache, tokens = tf.DynamicCache(config=model.config), TOKENS[:, :1]

    def steps() -> None:
        for _ in range(STEPS):
            model(tokens, past_key_values=cache)

    with torch.inference_mode():
        model(TOKENS, past_key_values=cache)
        model(tokens, past_key_values=cache)
        python = calls_of_python(steps)
        with Operators() as operators:
            steps()
    return python / LAYERS / STEPS, operators.count / LAYERS / STEPS


@pytest.fixture(scope="module")
def unpatched() -> tuple[float, float]:
    return cost(tiny_llama(num_hidden_layers=LAYERS).eval())


@pytest.mark.parametrize(
    ("variant", "settings", "python", "operators"),
    [
        ("moh", {"active_ratio": 1.0}, 14, 0),
        ("logn", {"train_length": 4}, 64, 11),
        ("ssmax", {}, 68, 12),
        ("moh", {}, 73, 16),
        ("moh", {"router": "learned"}, 96, 34),
        ("ssa", {}, 138, 24),
        ("sink", {}, 77, 13),
        ("gated", {}, 81, 11),
        ("fox", {}, 115, 20),
        ("act", {"heads": [[layer, head] for layer in range(LAYERS) for head in range(HEADS)]}, 165, 84),
    ],
)
def test_decoding_costs_few_calls_and_operators(
    variant: str, settings: dict[str, Any], python: int, operators: int, unpatched: tuple[float, float]
) -> None:
    found = cost(patchattn.patch_model(tiny_llama(num_hidden_layers=LAYERS).eval(), variant, settings))
    assert found[0] - unpatched[0] <= python
    assert found[1] - unpatched[1] <= operators
