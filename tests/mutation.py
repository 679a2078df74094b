"""What of a variant changes a model, and variants in which that is multiplied: tests of a variant must notice it.

`pytest tests/test_act*.py --mutate act.attend` runs tests of a variant with the change that its `attend` makes
multiplied by 1.5. It stops at the first assertion that fails, and fails itself if there is none.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import patchattn
from patchattn.core.layer_outputs import LayerOutputVariant
from patchattn.decoding.variant import DecodingVariant
from patchattn.reading.eviction import EvictionVariant, ScoredEviction
from patchattn.surgery.change import SurgeryVariant
from patchattn.vision.token_pruning import TokenPruning

FACTOR = 1.5
# Of each kind of variant, the methods that make its changes.
STAGES = {
    "attention": ("attend", "before_cache", "changed"),
    "surgery": ("attend", "plan"),
    "decoding": ("combine",),
    "cache": ("rule", "scores"),
}
TESTS = Path(__file__).parent


def stages(variant: type[patchattn.Variant]) -> list[str]:
    """The methods by which a variant changes a model."""
    if issubclass(variant, TokenPruning):  # whose attention is as it was
        return ["keep"]
    contract = (patchattn.Variant, LayerOutputVariant, SurgeryVariant, DecodingVariant, EvictionVariant, ScoredEviction)
    return [
        stage
        for stage in STAGES.get(variant.kind, ())
        if all(getattr(variant, stage, None) is not getattr(base, stage, None) for base in contract)
    ]


TESTED_TOGETHER = dict.fromkeys(("bibert", "sigmoid", "softpick"), "test_normalisers.py")


def own_tests(name: str) -> list[str]:
    """The files with a variant's own tests: `test_<name>.py` and `test_<name>_*.py`, or one that some share."""
    if name in TESTED_TOGETHER:
        return [str(TESTS / TESTED_TOGETHER[name])]
    return sorted(str(path) for pattern in (f"test_{name}.py", f"test_{name}_*.py") for path in TESTS.glob(pattern))


def _attend(original: Callable[..., Any], factor: float, *, difference: bool) -> Callable[..., Any]:
    def attend(self: Any, call: Any, inner: Any) -> Any:
        output, weights = original(self, call, inner)
        if not difference:
            return output * factor, weights
        base, _ = inner(call)
        return base + (output - base) * factor, weights

    return attend


def _before_cache(original: Callable[..., Any], factor: float, *, difference: bool) -> Callable[..., Any]:
    def before_cache(self: Any, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> Any:
        new_key, new_value = original(self, key, value, *rest)
        if not difference:
            return new_key * factor, new_value * factor
        return key + (new_key - key) * factor, value + (new_value - value) * factor

    return before_cache


def _changed(original: Callable[..., Any], factor: float, *, difference: bool) -> Callable[..., Any]:
    def changed(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        new = original(self, hidden)
        return hidden + (new - hidden) * factor if difference else new * factor

    return changed


def _combine(original: Callable[..., Any], factor: float, *, difference: bool) -> Callable[..., Any]:
    def combine(self: Any, logits: torch.Tensor, branch_logits: list[torch.Tensor]) -> torch.Tensor:
        combined = original(self, logits, branch_logits)
        return logits + (combined - logits) * factor if difference else combined * factor

    return combine


def _plan(original: Callable[..., Any], factor: float, *, difference: bool) -> Callable[..., Any]:
    def plan(self: Any, model: nn.Module) -> Any:
        changes = original(self, model)
        for change in changes:
            if isinstance(change.value, nn.Parameter):
                change.value.data.mul_(factor)
        return changes

    return plan


def _rule(original: Callable[..., Any], factor: float, *, difference: bool) -> Callable[..., Any]:
    """One more recent key is seen: sinks and windows are whole numbers."""

    def rule(self: Any, call: Any) -> Any:
        found = original(self, call)
        return found if found is None else found._replace(recent=found.recent + 1)

    return rule


def _scores(original: Callable[..., Any], factor: float, *, difference: bool) -> Callable[..., Any]:
    """The worst keys are kept: a factor would change no order."""
    return lambda self, *rest: -original(self, *rest)


def _keep(original: Callable[..., Any], factor: float, *, difference: bool) -> Callable[..., Any]:
    """Of the image tokens, the others are kept."""
    return lambda self, step: original(self, step) ^ step.image


_MUTATORS = {
    "attend": _attend,
    "before_cache": _before_cache,
    "changed": _changed,
    "combine": _combine,
    "keep": _keep,
    "plan": _plan,
    "rule": _rule,
    "scores": _scores,
}


def mutated(variant: type[patchattn.Variant], stage: str, factor: float = FACTOR, *, difference: bool = True) -> Any:
    """A variant's method, with what it changes multiplied.

    Args:
        variant: the class.
        stage: one of `stages(variant)`.
        factor: what by.
        difference: multiply the difference to what was there before, where that is known; else the result.
    """
    if variant.kind == "surgery":  # what was there before has other shapes
        difference = False
    return _MUTATORS[stage](getattr(variant, stage), factor, difference=difference)


class Mutant:
    """A plugin for a run of tests on a mutated variant: it passes if an assertion fails."""

    def __init__(self, name: str, stage: str) -> None:
        variant = patchattn.variant_info(name).variant
        setattr(variant, stage, mutated(variant, stage))
        self.is_killed = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        if call.excinfo is not None and isinstance(call.excinfo.value, AssertionError):
            self.is_killed = True
            item.session.shouldfail = f"the mutant was noticed by {item.nodeid}"
        return (yield)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        session.exitstatus = 0 if self.is_killed else 1
