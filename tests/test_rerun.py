"""What activation checkpointing runs again in `backward` gets what the forward knew, also in another thread: autograd
has one of its own for each GPU."""

import functools
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from patchattn.core.run import RUN

from .behaviour import Case, cases, toys, without_dropout
from .families import FAMILIES

pytestmark = pytest.mark.usefixtures("toys")

# Ids and image tokens, the vision encoder's attention, branches and what is asked of them, facts of keys, what modules
# are given.
READERS = [
    *[("llava", case) for case in cases("attention", "decoding") if case.variant in ("var", "damro")],
    *[("llama", case) for case in cases("decoding") if case.variant in ("cad", "decore")],
    *[("llama", case) for case in toys("attention", "decoding") if case.variant in ("toy_branch", "toy_state")],
    *[("llama", case) for case in toys("attention") if case.variant in ("toy_gate", "toy_store")],
]


def checkpointed(module: nn.Module) -> None:
    """Have a module checkpointed as a whole, its hooks included, as transformers does it to layers."""
    kind = type(module)

    def call(self, *args, **kwargs):
        return checkpoint(functools.partial(kind.__call__, self), *args, use_reentrant=False, **kwargs)

    module.__class__ = type(kind.__name__, (kind,), {"__call__": call})


def gradients(family: str, case: Case, change=None, *, in_a_thread: bool = False) -> dict:
    """By name, of a patched model that `change` was made to, another forward between its forward and its backward."""
    model = FAMILIES[family].make_exact()
    without_dropout(model)
    case.patch(model).train()
    if change is not None:
        change(model)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in FAMILIES[family].inputs().items()}
    loss = model(**inputs, use_cache=False, logits_to_keep=3).logits.clamp(min=-1e3).pow(2).mean()
    with torch.no_grad():  # what a forward knows is not what one after it knows
        model(**{name: tensor.flip(-1) for name, tensor in inputs.items()}, use_cache=False)
    failed: list[BaseException] = []

    def backward() -> None:
        try:
            loss.backward()
        except BaseException as error:
            failed.append(error)

    if in_a_thread:
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
    else:
        backward()
    if failed:
        raise failed[0]
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("family", "case"), READERS, ids=str)
def test_layers(family: str, case: Case) -> None:
    expected = gradients(family, case)
    for use_reentrant in (False, True):
        for in_a_thread in (False, True):

            def enable(model: nn.Module, use_reentrant: bool = use_reentrant) -> None:
                model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})

            assert_equal(gradients(family, case, enable, in_a_thread=in_a_thread), expected)


@pytest.mark.parametrize(("family", "case"), READERS, ids=str)
@pytest.mark.parametrize("in_a_thread", [False, True])
def test_the_language_model_as_a_whole(family: str, case: Case, in_a_thread: bool) -> None:
    def wrap(model: nn.Module) -> None:
        checkpointed(model.model.language_model if family == "llava" else model.model)

    assert_equal(gradients(family, case, wrap, in_a_thread=in_a_thread), gradients(family, case))


def test_a_branch_whose_layers_hand_nothing_on() -> None:
    case = next(case for case in cases("decoding") if case.variant == "decore")
    model = case.patch(FAMILIES["llama"].make_exact())

    def without(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        return args, {name: value for name, value in kwargs.items() if name != RUN}

    expected = model(**FAMILIES["llama"].inputs()).logits
    for layer in model.model.layers:
        layer.register_forward_pre_hook(without, with_kwargs=True)
    torch.testing.assert_close(model(**FAMILIES["llama"].inputs()).logits, expected)
    model.train()
    with pytest.raises(NotImplementedError, match="not told which branch"):
        model(**FAMILIES["llama"].inputs())
    with torch.no_grad():
        model(**FAMILIES["llama"].inputs())
