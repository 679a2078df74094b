"""Layer shortcuts against loops in float64, at their start, with padding, caches and checkpointing; and refusals."""

from math import erf
from typing import Any

import numpy as np
import pytest
import torch

import patchattn
from patchattn.core.run import RUN

from .behaviour import close, randomise, variant_parameters
from .families import FAMILIES, outputs
from .pieces import in_chunks
from .reference import DIM, HEADS, WIDTH, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13], [2, 8, 8, 1, 30, 4, 6]])
LAST = 3


def live(**settings: Any) -> Any:
    model = patchattn.patch_model(tiny_llama(num_hidden_layers=LAST + 1), "layer_shortcuts", width=5, **settings)
    randomise(model)
    return model


def added(own: Any, given: list[np.ndarray], x: np.ndarray) -> np.ndarray:
    """`(T, H, D)` what is added, of what layers were given `(T, E)` each and of the input of attention `(T, E)`."""
    query, value, maps = (getattr(own, name).detach().numpy() for name in ("query", "value", "features"))
    features = []
    for states, weight in zip(given, maps, strict=True):
        hidden = [weight @ (z / np.sqrt(np.mean(z**2) + np.finfo(float).eps)) for z in states]
        features.append([np.array([h * 0.5 * (1 + erf(h / np.sqrt(2))) for h in row]) for row in hidden])
    found = np.zeros((len(x), HEADS, DIM))
    for i in range(len(x)):
        read = [depth[j] for depth in features for j in range(i + 1)]
        for head in range(HEADS):
            asked = query.reshape(HEADS, 5, WIDTH)[head] @ x[i]
            raised = np.exp([asked @ f / np.sqrt(5) for f in read])
            found[i, head] = value[head] @ (np.array(read).T @ (raised / raised.sum()))
    return found


@pytest.mark.parametrize("depths", [None, (1,), (0, 1, 2)], ids=str)
@torch.no_grad()
def test_by_loops(depths: Any) -> None:
    model = live(depths=depths)
    layers, seen = model.model.layers, {}
    own = layers[LAST].self_attn.patchattn.layer_shortcuts
    for depth, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda _, args, depth=depth: seen.update({depth: args[0]}))
    layers[LAST].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(x=kwargs["hidden_states"]), with_kwargs=True
    )
    for at in ("base", "model"):
        with patchattn.probed(model, lambda call, output, at=at: seen.update({at: output}), layers=LAST, at=at):
            model(TOKENS)
    for text in range(2):
        given = [seen[depth][text].numpy() for depth in (depths or (0, 1, 2))]
        want = seen["base"][text].numpy() + added(own, given, seen["x"][text].numpy())
        np.testing.assert_allclose(seen["model"][text].numpy(), want, rtol=0, atol=1e-10)


def test_it_starts_at_the_model_and_everything_learns_by_the_second_step() -> None:
    model = FAMILIES["llama"].make()
    before = outputs(model, input_ids=TOKENS)[0]
    patchattn.patch_model(model, "layer_shortcuts", width=5)
    assert torch.equal(outputs(model, input_ids=TOKENS)[0], before)
    assert [site["variants"] for site in patchattn.patch_info(model).sites] == [[], ["layer_shortcuts"]]
    parameters = list(variant_parameters(model).values())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        (model(TOKENS).logits * torch.linspace(-1, 1, 64)).sum().backward()
        learns = [bool((parameter.grad.abs() > 0).any()) for parameter in parameters]
        assert learns == [step == 1, step == 1, True]  # features and queries stand behind values of 0
        optimizer.step()


@pytest.mark.parametrize("chunks", [[9], [4, 3, 1, 1]], ids=str)
@torch.no_grad()
def test_padding_in_one_call_or_in_chunks(chunks: list[int]) -> None:
    model = live()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]])
    tokens = torch.randint(1, 50, mask.shape, generator=torch.Generator().manual_seed(0))
    found = in_chunks(model, tokens, mask, chunks)
    for text, real, got in zip(tokens, mask.bool(), found, strict=True):
        close(got[real], model(text[real][None]).logits[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model, found = live().train(), []
    for checkpoints in (False, True):
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(TOKENS).logits.square().sum().backward()
        found.append([p.grad.clone() for p in [*variant_parameters(model).values(), model.lm_head.weight]])
    for left, right in zip(*found, strict=True):
        close(left, right)


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match=r"reads what layers before 3 .* were given; got depths=\(1, 3\)"):
        live(depths=[1, 3])
    with pytest.raises(ValueError, match=r"reads each layer once, got depths=\(0, 0\)"):
        live(depths=[0, 0])
    with pytest.raises(ValueError, match="layers before 0"):
        patchattn.patch_model(tiny_llama(), "layer_shortcuts")
    with pytest.raises(NotImplementedError, match="does not support bidirectional or cross"):
        patchattn.patch_model(FAMILIES["bert"].make(), "layer_shortcuts")
    model = tiny_llama(num_hidden_layers=2)
    model.model.forward = lambda input_ids: None
    with pytest.raises(NotImplementedError, match="which runs them, hands none on"):
        patchattn.patch_model(model, "layer_shortcuts")
    model = live()
    last, forward = model.model.layers[LAST], model.model.layers[LAST].forward
    last.forward = lambda *args, **kwargs: forward(*args, **{k: v for k, v in kwargs.items() if k != RUN})
    with pytest.raises(NotImplementedError, match="was not told what earlier layers were given"):
        model(TOKENS)
    config = {"quest": {"page": 2, "budget": 4, "dense_layers": 0}, "layer_shortcuts": {}}
    model = patchattn.patch_model(tiny_llama(num_hidden_layers=2), list(config), config=config)
    with pytest.raises(NotImplementedError, match="remembers something of every key and cannot run inside"):
        model.generate(TOKENS, max_new_tokens=2, do_sample=False)
    model = live()
    own = model.model.layers[LAST].self_attn.patchattn.layer_shortcuts
    own.value = torch.nn.Parameter(own.value[:, :3])
    with pytest.raises(NotImplementedError, match=r"gives every head of .* 3; there are 32 and 8"):
        model(TOKENS)
