"""The load-balance loss, against formulas written here in float64."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

import patchattn
from patchattn.core.report import Observation
from patchattn.training import balance_loss
from patchattn.training.balance import BalanceLoss

from .reference import tiny_llama
from .training import LEARNED, ROUTERS, TOKENS, gradients, patched, rows


def seen_by_hand(model: torch.nn.Module, inputs: dict[str, Any], real: np.ndarray) -> list[float]:
    """Per layer sum_i P_i f_i, from the inputs of the layers and the routers' weights, token by token."""
    sites = [module for module in model.modules() if hasattr(module, "patchattn")]
    seen: list[np.ndarray] = []
    handles = [
        site.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).detach().numpy()),
            with_kwargs=True,
        )
        for site in sites
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    losses = []
    for site, tokens in zip(sites, seen, strict=True):
        variant = site.patchattn.moh
        if variant.config.router == "learned":
            logits = tokens @ variant.routed_weight.detach().numpy().T
        else:
            queries = tokens @ site.q_proj.weight.detach().numpy().T
            norms = np.linalg.norm(queries.reshape(*tokens.shape[:2], variant.heads, -1), axis=-1)
            norms = norms[..., variant.shared :]
            logits = norms / norms.std(axis=-1, ddof=1, keepdims=True)
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        probability = powers / powers.sum(-1, keepdims=True)
        order = np.argsort(-probability, axis=-1)[..., : variant.budget]
        choice = np.zeros_like(probability)
        np.put_along_axis(choice, order, 1.0, axis=-1)
        losses.append(float((probability[real].mean(0) * choice[real].mean(0)).sum()))
    return losses


@pytest.mark.parametrize("router", [{"active_ratio": 0.5, "shared_ratio": 0.25}, LEARNED], ids=ROUTERS)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_balance_loss_follows_the_formula_without_padding(router: dict[str, Any], side: str) -> None:
    model = patched(router)
    real = np.ones(TOKENS.shape, dtype=bool)
    if side != "none":
        real[1, slice(0, 3) if side == "left" else slice(5, None)] = False
    inputs = {"input_ids": TOKENS, "attention_mask": torch.tensor(real).long()}
    by_hand = seen_by_hand(model, inputs, real)
    for definition, factor in (("paper", 1), ("released", 3)):
        with balance_loss(model, 0.5, definition) as balance:
            model(**inputs)
        assert balance().item() == pytest.approx(0.5 * factor * np.mean(by_hand), rel=1e-6)


def test_padding_of_encoders_is_left_out_too() -> None:
    model = patched(LEARNED, "bert")
    mask = torch.ones_like(TOKENS)
    mask[0, 6:] = 0
    by_hand = seen_by_hand(model, {"input_ids": TOKENS, "attention_mask": mask}, mask.bool().numpy())
    with balance_loss(model, 1.0) as balance:
        model(input_ids=TOKENS, attention_mask=mask)
    assert balance().item() == pytest.approx(np.mean(by_hand), rel=1e-6)


@settings(deadline=None, max_examples=40)
@given(heads=st.integers(1, 6), tokens=st.integers(1, 7), k=st.integers(1, 6), seed=st.integers(0, 99))
def test_a_perfectly_even_router_has_the_least_loss(heads: int, tokens: int, k: int, seed: int) -> None:
    """sum_i P_i f_i is K / R where P is even, and lies between 0 and 1 times the largest load."""
    k = min(k, heads)
    generator = torch.Generator().manual_seed(seed)
    choice = torch.zeros(1, tokens, heads).scatter(
        -1, torch.rand(1, tokens, heads, generator=generator).topk(k, -1).indices, 1.0
    )
    real = torch.ones(1, tokens, dtype=torch.bool)
    even = BalanceLoss(1.0, "paper")
    site = patchattn.find_sites(tiny_llama())[0]

    source = SimpleNamespace(mask=SimpleNamespace(real=lambda: real))
    values = {"router_probability": torch.full((1, tokens, heads), 1 / heads), "router_choice": choice}
    even.note(Observation(site, values, source))
    assert even().item() == pytest.approx(k / heads, rel=1e-5)


@pytest.mark.parametrize("router", [{"active_ratio": 0.5, "shared_ratio": 0.0}, LEARNED], ids=ROUTERS)
@pytest.mark.parametrize("wrap", ["plain", "checkpointing", "peft"])
def test_the_gradient_is_that_of_the_formula(router: dict[str, Any], wrap: str) -> None:
    """By finite differences of the loss in one weight that feeds a router; counted once under checkpointing."""
    model = patched(router)
    if wrap == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if wrap == "peft":
        model = get_peft_model(model, LoraConfig(target_modules=["v_proj"], modules_to_save=["patchattn"]))
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    inner = model.get_base_model() if wrap == "peft" else model
    inner.config.use_cache = False
    weight = inner.model.layers[1].self_attn.q_proj.weight
    if router is LEARNED:
        weight = dict(inner.model.layers[1].self_attn.named_parameters())[
            "patchattn.modules_to_save.default.moh.routed_weight" if wrap == "peft" else "patchattn.moh.routed_weight"
        ]

    def loss() -> torch.Tensor:
        with balance_loss(model, 1.0) as balance:
            task = model(input_ids=TOKENS, labels=TOKENS).loss
        return task * 0 + balance()

    loss().backward()
    got, step = float(weight.grad[1, 2]), 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[1, 2] += sign * step
            values.append(float(loss()))
            weight[1, 2] -= sign * step
    assert got == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-9)
    assert abs(got) > 1e-8


def test_checkpointing_changes_no_gradient_and_reentrant_checkpointing_is_refused() -> None:
    found = []
    for checkpointing in (None, False, True):
        model = patched(LEARNED)
        model.config.use_cache = False
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        with balance_loss(model, 1.0) as balance:
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
        if checkpointing:
            with pytest.raises(NotImplementedError, match=r"layers\.0\.self_attn .*use_reentrant"):
                balance()
            continue
        (loss + balance()).backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name])


def test_forwards_without_gradients_do_not_count_beside_those_with_them() -> None:
    model = patched(LEARNED)
    with balance_loss(model, 1.0) as balance:
        model(TOKENS)
    with balance_loss(model, 1.0) as beside:
        with torch.no_grad():
            model(TOKENS.flip(1))
        model(TOKENS)
        with torch.no_grad():
            model(TOKENS.flip(1))
    assert torch.equal(beside(), balance())
    with balance_loss(model, 1.0) as alone, torch.no_grad():
        model(TOKENS)
    with pytest.raises(NotImplementedError, match="not with gradients"):
        alone()
    with torch.no_grad(), balance_loss(model, 1.0) as evaluated:
        model(TOKENS)
    torch.testing.assert_close(evaluated(), balance().detach())


def test_two_losses_of_two_forwards_do_not_mix() -> None:
    model = patched(LEARNED)
    with balance_loss(model) as first:
        model(TOKENS)
    with balance_loss(model) as second:
        model(TOKENS.flip(1))
    assert not torch.equal(first(), second())
    with balance_loss(model) as both:
        model(TOKENS)
        model(TOKENS.flip(1))
    torch.testing.assert_close(both(), (first() + second()) / 2)
    assert not any(variant.observers for variant in model.modules() if isinstance(variant, patchattn.Variant))


def test_the_balance_loss_compiles() -> None:
    model = patched(LEARNED).float()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    values = []
    for each in (model, compiled):
        model.zero_grad()
        with balance_loss(each, 1.0) as balance:
            loss = each(input_ids=TOKENS, labels=TOKENS).loss
        (loss + balance()).backward()
        values.append((balance().detach(), gradients(model)["model.layers.1.self_attn.patchattn.moh.routed_weight"]))
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


def test_training_makes_a_one_sided_router_even() -> None:
    """Through the loss alone: a router that sends all tokens to one head learns to spread them."""
    model = patched({"router": "learned", "active_heads": 1, "shared_heads": 0}, "bert")
    with torch.no_grad():
        for variant in (m for m in model.modules() if isinstance(m, patchattn.Variant)):
            variant.routed_weight.mul_(20)
    routers = [p for name, p in model.named_parameters() if "routed_weight" in name]
    optimizer = torch.optim.Adam(routers, lr=0.05)

    def unevenness() -> float:
        with patchattn.routing_statistics(model) as statistics, torch.no_grad():
            model(TOKENS)
        return 1 - np.mean([layer.balance for layer in statistics.layers()])

    before = unevenness()
    for _ in range(60):
        with balance_loss(model, 1.0) as balance:
            model(TOKENS)
        balance().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert unevenness() < before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: balance_loss(tiny_llama()), "nothing to balance"),
        (lambda: balance_loss(patchattn.patch_model(tiny_llama(), "ssa")), "nothing to balance"),
        (lambda: balance_loss(patched({}), weight=-1.0), "at least 0, got -1.0"),
        (lambda: balance_loss(patched({}), weight="big"), "got 'big'"),
        (lambda: balance_loss(patched({}), definition="mine"), "'paper', 'released', got 'mine'"),
    ],
)
def test_mistakes_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message), make():
        pass


def test_a_loss_without_a_forward_is_refused() -> None:
    with balance_loss(patched({})) as balance:
        pass
    with pytest.raises(ValueError, match="No router ran"):
        balance()


def test_accelerate_gets_the_loss() -> None:
    """An accelerate loop with accumulation: the gradient is the mean over its batches of task and balance loss."""
    model = patched(LEARNED)
    batches = [torch.stack([row["input_ids"] for row in rows()[first : first + 2]]) for first in (0, 2)]
    for batch in batches:
        with balance_loss(model, 0.5) as balance:
            loss = model(batch, labels=batch).loss
        ((loss + balance()) / 2).backward()
    expected = gradients(model)
    model.zero_grad()
    accelerator = Accelerator(gradient_accumulation_steps=2)
    prepared = accelerator.prepare(model)
    for batch in batches:
        with accelerator.accumulate(prepared):
            with balance_loss(prepared, 0.5) as balance:
                loss = prepared(batch, labels=batch).loss
            accelerator.backward(loss + balance())  # divides by the number of accumulated batches
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])
