"""The load-balance loss, optimizer groups, callbacks and Trainer mixin, against formulas written here in float64."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import patchattn
from patchattn.call import Observation
from patchattn.training import balance_loss, optimizer_groups
from patchattn.training.balance import BalanceLoss

from .families import FAMILIES, outputs
from .reference import HEADS, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13, 4], [8, 2, 41, 6, 6, 30, 11, 17]])
ROUTERS = ["query_norm", "learned"]
LEARNED = {"router": "learned", "active_ratio": 0.75, "shared_ratio": 0.25}


class PatchedTrainer(patchattn.PatchedTrainerMixin, Trainer):
    pass


def patched(settings: dict[str, Any], family: str = "llama") -> torch.nn.Module:
    """A float64 model in training mode, without dropout."""
    model = FAMILIES[family].make_exact()
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    torch.manual_seed(3)
    return patchattn.patch_model(model, "moh", settings).train()


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

    class Source:
        def real_tokens(self) -> torch.Tensor:
            return real

    values = {"router_probability": torch.full((1, tokens, heads), 1 / heads), "router_choice": choice}
    even.note(Observation(site, values, Source()))
    assert even().item() == pytest.approx(k / heads, rel=1e-5)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


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
        context = pytest.raises(NotImplementedError, match="use_reentrant") if checkpointing else None
        if context is not None:
            with context, balance_loss(model):
                model(input_ids=TOKENS, labels=TOKENS)
            continue
        with balance_loss(model, 1.0) as balance:
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
        (loss + balance()).backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name])


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


def rows(count: int = 8, length: int = 6) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": row, "labels": row} for row in torch.randint(3, 60, (count, length), generator=generator)]


def trainer(folder: Path, model: torch.nn.Module, data: Any, callbacks: Any = None, **extra: Any) -> PatchedTrainer:
    own = {key: extra.pop(key) for key in list(extra) if key.startswith(("balance", "scale"))}
    defaults = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{
            **defaults,
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            **extra,
        },
    )
    return PatchedTrainer(model, arguments, train_dataset=data, callbacks=callbacks, **own)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_trainer_adds_the_loss_once_whatever_the_accumulation(
    family: str, label_smoothing: float, accumulation: int, tmp_path: Path
) -> None:
    """What the weight adds to one SGD step is -lr times the mean over batches of the loss's gradient, whether the
    Trainer averages over accumulated batches or leaves that to the model."""
    data = rows(2 * accumulation)
    ends = []
    for weight in (0.0, 5.0):
        model = patched(LEARNED, family)
        extra = {"gradient_accumulation_steps": accumulation, "label_smoothing_factor": label_smoothing}
        trainer(tmp_path, model, data, balance_weight=weight, train_sampling_strategy="sequential", **extra).train()
        ends.append({name: p.detach() for name, p in model.named_parameters()})
    model = patched(LEARNED, family)
    for first in range(0, len(data), 2):
        with balance_loss(model, 5.0) as balance:
            model(torch.stack([row["input_ids"] for row in data[first : first + 2]]))
        (balance() / accumulation).backward()
    routers = {name: p for name, p in model.named_parameters() if "routed_weight" in name}
    assert len(routers) == 2
    for name, p in routers.items():
        torch.testing.assert_close(ends[1][name] - ends[0][name], -0.1 * p.grad, rtol=1e-4, atol=1e-9)


def test_evaluation_has_no_balance_loss(tmp_path: Path) -> None:
    data = rows(2)
    values = [
        trainer(tmp_path, patched(LEARNED), data, balance_weight=weight).evaluate(data)["eval_loss"]
        for weight in (0.0, 100.0)
    ]
    assert values[0] == values[1]


def test_trainer_refuses_a_weight_without_a_router_and_a_rate_without_scales(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to balance"):
        trainer(tmp_path, patchattn.patch_model(tiny_llama(), "ssa"), rows(), balance_weight=0.01)
    with pytest.raises(ValueError, match="no variant of the model has any"):
        trainer(tmp_path, patched(LEARNED), rows(), scale_learning_rate=0.1).train()


def test_scales_have_a_learning_rate_of_their_own(tmp_path: Path) -> None:
    """SGD moves every parameter by its group's rate times its gradient; decay spares the scales."""
    data = rows(2)
    model = patchattn.patch_model(FAMILIES["llama"].make_exact(), "ssa").train()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = {key: torch.stack([row[key] for row in data]) for key in data[0]}
    model(**batch).loss.backward()
    grads = gradients(model)
    model.zero_grad()
    trainer(tmp_path, model, data, scale_learning_rate=3.0, train_sampling_strategy="sequential").train()
    for name, p in model.named_parameters():
        rate = 3.0 if "alpha" in name else 0.1
        torch.testing.assert_close(p.detach(), start[name] - rate * grads[name], rtol=1e-4, atol=1e-9)
    groups = optimizer_groups(model, 0.1, scale_learning_rate=3.0, weight_decay=0.5)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.1, 0.5), (0.1, 0.0), (3.0, 0.0)]
    together = [id(p) for group in groups for p in group["params"]]
    assert sorted(together) == sorted(id(p) for p in model.parameters())
    assert {p.numel() for p in groups[2]["params"]} == {1}
    with pytest.raises(ValueError, match="No parameter"):
        optimizer_groups(model.requires_grad_(False), 0.1)


def test_routing_is_logged_per_layer_and_head(tmp_path: Path) -> None:
    model = patched({"active_heads": 2, "shared_heads": 1})
    made = trainer(tmp_path, model, rows(), max_steps=3, logging_steps=1)
    made.add_callback(patchattn.RoutingCallback(made))
    made.train()
    logs = [entry for entry in made.state.log_history if any(key.startswith("routing/") for key in entry)]
    assert len(logs) == 3
    assert sum("loss" in entry for entry in made.state.log_history) == 3  # beside the Trainer's own entries
    for entry in logs:
        for layer in range(2):
            prefix = f"routing/model.layers.{layer}.self_attn"
            usage = [entry[f"{prefix}/head_{head}"] for head in range(HEADS)]
            assert usage[0] == 1.0
            assert sum(usage) == pytest.approx(2.0)
            assert 0.0 <= entry[f"{prefix}/balance"] <= 1.0
            assert 0.0 <= entry[f"{prefix}/entropy"] <= 1.0
    assert not any(v.observers for v in model.modules() if isinstance(v, patchattn.Variant))
    twin = copy.deepcopy(model)
    assert torch.equal(outputs(twin.eval(), input_ids=TOKENS)[0], outputs(model.eval(), input_ids=TOKENS)[0])


def test_routing_statistics_follow_their_definitions() -> None:
    model = patched(LEARNED, "bert")
    mask = torch.ones_like(TOKENS)
    mask[1, 4:] = 0
    probabilities: list[np.ndarray] = []
    gates: list[np.ndarray] = []

    def keep(seen: Observation) -> None:
        probabilities.append(seen.values["router_probability"].numpy()[mask.bool().numpy()])
        gates.append(seen.values["gate"].numpy()[mask.bool().numpy()])

    with patchattn.observe(model, keep), patchattn.routing_statistics(model) as statistics, torch.no_grad():
        model(TOKENS, attention_mask=mask)
    for layer, probability, gate in zip(statistics.layers(), probabilities, gates, strict=True):
        assert layer.usage == pytest.approx((gate > 0).mean(0).tolist())
        entropy = -(probability * np.log(probability)).sum(-1).mean() / math.log(3)
        assert layer.entropy == pytest.approx(entropy)
        load = (gate[:, 1:] > 0).sum(0) / (gate[:, 1:] > 0).sum()
        assert layer.balance == pytest.approx(-sum(x * math.log(x) for x in load if x) / math.log(3))
    with pytest.raises(ValueError, match="No router has run"), patchattn.routing_statistics(model) as statistics:
        statistics.layers()


def test_active_heads_fall_from_all_to_the_budget(tmp_path: Path) -> None:
    model = patched({"active_heads": 2, "shared_heads": 1})
    seen: list[float] = []

    class Watch(patchattn.training.ActiveRatioCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with patchattn.routing_statistics(model) as statistics, torch.no_grad():
                model(TOKENS)
            seen.append(sum(statistics.usage()[0]))

    trainer(tmp_path, model, rows(), [Watch(4)], max_steps=6).train()
    assert seen == [4.0, 4.0, 3.0, 3.0, 2.0, 2.0]
    with pytest.raises(ValueError, match="over 9 steps, but the training has 6"):
        trainer(tmp_path, model, rows(), [patchattn.ActiveRatioCallback(9)], max_steps=6).train()
    with pytest.raises(ValueError, match="at least 0, got -1"):
        patchattn.ActiveRatioCallback(-1)
    with pytest.raises(ValueError, match="not patched with MoH"):
        patchattn.anneal_active_heads(tiny_llama(), 0, 4)


def test_all_heads_at_the_start_of_the_fall_equal_the_base() -> None:
    model = FAMILIES["llama"].make_exact()
    inputs = FAMILIES["llama"].inputs()
    base = outputs(model, **inputs)[0]
    patchattn.patch_model(model, "moh", active_ratio=0.5)
    patchattn.anneal_active_heads(model, 0, 10)
    assert torch.equal(outputs(model, **inputs)[0], base)
    patchattn.anneal_active_heads(model, 10, 10)
    assert not torch.equal(outputs(model, **inputs)[0], base)


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


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "llama", "qwen3", "gpt2", "vit"])
@pytest.mark.parametrize("router", [{"active_ratio": 0.5}, LEARNED], ids=ROUTERS)
def test_encoders_decoders_and_vision_models_train(family: str, router: dict[str, Any]) -> None:
    """Towards a fixed target, with the balance loss: the error falls, and every router's weights move."""
    model = patched(router, family).float()
    inputs = FAMILIES[family].inputs()

    def result() -> torch.Tensor:
        output = model(**inputs)
        return output.logits if "logits" in output else output.last_hidden_state

    target = torch.randn(result().shape, generator=torch.Generator().manual_seed(5))
    start = {name: p.detach().clone() for name, p in model.named_parameters() if "patchattn" in name}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    errors = []
    for _ in range(25):
        with balance_loss(model) as balance:
            error = (result() - target).pow(2).mean()
        (error + balance()).backward()
        optimizer.step()
        optimizer.zero_grad()
        errors.append(error.item())
    assert errors[-1] < 0.9 * errors[0]
    end = dict(model.named_parameters())
    assert all(not torch.equal(end[name], value) for name, value in start.items())
