"""Optimizer groups, callbacks and the Trainer mixin, against formulas written here in float64."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patchattn
from patchattn.core.report import Observation
from patchattn.training import balance_loss, optimizer_groups
from patchattn.variants.routing.moh import anneal_active_heads
from patchattn.variants.routing.moh.callback import ActiveRatioCallback

from .families import FAMILIES, outputs
from .reference import HEADS, tiny_llama
from .training import LEARNED, ROUTERS, TOKENS, gradients, patched, rows, trainer


@pytest.mark.parametrize(
    ("family", "label_smoothing", "accumulation"),
    [("llama", 0.0, 1), ("llama", 0.1, 4), ("bert", 0.1, 1), ("bert", 0.0, 4)],
)
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

    class Watch(ActiveRatioCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with patchattn.routing_statistics(model) as statistics, torch.no_grad():
                model(TOKENS)
            seen.append(sum(statistics.usage()[0]))

    trainer(tmp_path, model, rows(), [Watch(4)], max_steps=6).train()
    assert seen == [4.0, 4.0, 3.0, 3.0, 2.0, 2.0]
    with pytest.raises(ValueError, match="over 9 steps, but the training has 6"):
        trainer(tmp_path, model, rows(), [ActiveRatioCallback(9)], max_steps=6).train()
    with pytest.raises(ValueError, match="at least 0, got -1"):
        ActiveRatioCallback(-1)
    with pytest.raises(ValueError, match="not patched with MoH"):
        anneal_active_heads(tiny_llama(), 0, 4)


def test_all_heads_at_the_start_of_the_fall_equal_the_base() -> None:
    model = FAMILIES["llama"].make_exact()
    inputs = FAMILIES["llama"].inputs()
    base = outputs(model, **inputs)[0]
    patchattn.patch_model(model, "moh", active_ratio=0.5)
    anneal_active_heads(model, 0, 10)
    assert torch.equal(outputs(model, **inputs)[0], base)
    anneal_active_heads(model, 10, 10)
    assert not torch.equal(outputs(model, **inputs)[0], base)


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
