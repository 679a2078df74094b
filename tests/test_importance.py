"""Importance of heads against a gate per head, and against the formulas in float64 numpy on what hooks see."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification

import patchattn
from patchattn.core.importance import HeadImportance
from patchattn.inspection.head_importance import head_importance

from .families import FAMILIES

Batch = dict[str, torch.Tensor]
LAYERS = range(2)
# attention module to the projection that reads its heads, as the model code has them
OUTPUTS = {
    "llama": {f"model.layers.{i}.self_attn": f"model.layers.{i}.self_attn.o_proj" for i in LAYERS},
    "gpt2": {f"transformer.h.{i}.attn": f"transformer.h.{i}.attn.c_proj" for i in LAYERS},
    "bert": {
        f"bert.encoder.layer.{i}.attention.{p}": f"bert.encoder.layer.{i}.attention.output.dense"
        for i in LAYERS
        for p in ("self",)
    },
    "t5": {
        f"{tower}.block.{i}.layer.{place}.{name}": f"{tower}.block.{i}.layer.{place}.{name}.o"
        for i in LAYERS
        for tower, place, name in (
            ("encoder", 0, "SelfAttention"),
            ("decoder", 0, "SelfAttention"),
            ("decoder", 1, "EncDecAttention"),
        )
    },
}
HEADS = 4


def classifier() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=3, **sizes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return model


def make(family: str) -> nn.Module:
    return classifier() if family == "bert" else FAMILIES[family].make_exact()


def examples(family: str, count: int = 5) -> list[Batch]:
    """Batches of one, of different lengths and without padding."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for number in range(count):
        tokens = torch.randint(3, 64, (1, 5 + number), generator=generator)
        example = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if family == "bert":
            example["labels"] = torch.randint(3, (1,), generator=generator)
        if family == "t5":
            example["labels"] = torch.randint(3, 64, (1, 4), generator=generator)
        found.append(example)
    return found


def padded(batch: list[Batch], left: bool = False) -> Batch:
    """Several examples as one batch."""
    length = max(example["input_ids"].shape[1] for example in batch)
    merged: Batch = {}
    for name in batch[0]:
        rows = []
        for example in batch:
            row = example[name]
            missing = length - row.shape[1] if name in ("input_ids", "attention_mask") else 0
            rows.append(nn.functional.pad(row, (missing, 0) if left else (0, missing)) if missing else row)
        merged[name] = torch.cat(rows)
    return merged


def losses(family: str, model: nn.Module, example: Batch) -> torch.Tensor:
    """Sum of the cross entropy of all that one example predicts."""
    inputs = {name: value for name, value in example.items() if family == "t5" or name != "labels"}
    logits = model(**inputs).logits
    if family == "bert":
        return cross_entropy(logits, example["labels"], reduction="sum")
    if family == "t5":
        return cross_entropy(logits[0], example["labels"][0], reduction="sum")
    return cross_entropy(logits[0, :-1], example["input_ids"][0, 1:], reduction="sum")


def gated(family: str, model: nn.Module, example: Batch, projection: str, head: int) -> np.ndarray:
    """Gradient `(T,)` of the loss by a gate per token on one head, where its output projection reads it."""
    gates: list[torch.Tensor] = []

    def gate(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        states = args[0]
        gates.append(torch.ones(states.shape[1], dtype=states.dtype, requires_grad=True))
        dim = states.shape[-1] // HEADS
        before, own, after = (
            states[..., : head * dim],
            states[..., head * dim : head * dim + dim],
            states[..., head * dim + dim :],
        )
        return (torch.cat([before, own * gates[0][:, None], after], -1), *args[1:])

    handle = model.get_submodule(projection).register_forward_pre_hook(gate)
    losses(family, model, example).backward()
    handle.remove()
    model.zero_grad()
    assert gates[0].grad is not None
    return gates[0].grad.numpy()


def by_hand(family: str, model: nn.Module, data: list[list[Batch]], per: str) -> dict[str, list[float]]:
    """Michel's importance of every head, batch by batch, unpadded."""
    found = {}
    for site, projection in OUTPUTS[family].items():
        scores = []
        for head in range(HEADS):
            batches = [[gated(family, model, e, projection, head) for e in batch] for batch in data]
            rows = [row for batch in batches for row in batch]
            if per == "token":
                scores.append(np.abs(np.concatenate(rows)).mean())
            elif per == "example":
                scores.append(np.mean([abs(row.sum()) for row in rows]))
            else:
                scores.append(np.mean([abs(sum(row.sum() for row in batch)) for batch in batches]))
        found[site] = scores
    return found


def close(found: HeadImportance, expected: dict[str, Any], tolerance: float = 1e-9) -> None:
    assert set(found.scores) == set(expected)
    for name, scores in expected.items():
        np.testing.assert_allclose(found.scores[name], scores, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("per", ["token", "example", "batch"])
@pytest.mark.parametrize("family", list(OUTPUTS))
def test_gradients_equal_those_of_a_gate_on_each_head(family: str, per: Any) -> None:
    model, data = make(family), examples(family, 3)
    split = [data[:2], data[2:]]
    expected = by_hand(family, model, split, per)
    batches = [padded(part, left=family in ("llama",)) for part in split]
    found = head_importance(model, batches, "michel", per=per, normalise=False)
    close(found, expected, 1e-6)  # its gates are in float32
    assert found.method == "michel"
    assert found.settings == {"per": per, "loss": "own", "normalise": False}
    normalised = {name: np.array(s) / np.linalg.norm(s) for name, s in expected.items()}
    close(head_importance(model, batches, "michel", per=per), normalised, 1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("method", ["michel", "flap", "amp", "entropy"])
@pytest.mark.parametrize("family", list(OUTPUTS))
def test_padding_and_batching_change_nothing(family: str, method: str) -> None:
    model, data = make(family), examples(family)
    alone = head_importance(model, data, method)
    together = head_importance(model, [padded(data[:3]), padded(data[3:])], method)
    close(together, alone.scores, 1e-5)
    assert together.tokens == alone.tokens == sum(e["input_ids"].shape[1] for e in data)
    if family == "llama":
        close(head_importance(model, [padded(data, left=True)], method), alone.scores, 1e-5)


def inputs_of(model: nn.Module, name: str, data: list[Batch]) -> np.ndarray:
    """`(N, C)` float64: all rows that a module reads."""
    rows: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for example in data:
            model(**example)
    handle.remove()
    return torch.cat(rows).double().numpy()


def weight_of(family: str, model: nn.Module, projection: str) -> np.ndarray:
    weight = model.get_submodule(projection).weight.detach().double().numpy()
    return weight.T if family == "gpt2" else weight


@pytest.mark.parametrize("metric", ["wifv", "ifv", "wifn"])
@pytest.mark.parametrize("family", list(OUTPUTS))
def test_fluctuation(family: str, metric: Any) -> None:
    model, data = make(family), examples(family)
    plain, standard = {}, {}
    for site, projection in OUTPUTS[family].items():
        x, weight = inputs_of(model, projection, data), weight_of(family, model, projection)
        variance = ((x - x.mean(0)) ** 2).sum(0) / (len(x) - 1)
        channels = {
            "wifv": variance * (weight**2).sum(0),
            "ifv": variance,
            "wifn": np.abs(weight).mean(0) * np.sqrt((x**2).sum(0) / len(x)),
        }[metric]
        plain[site] = channels.reshape(HEADS, -1).mean(1)
        channels = (channels - channels.mean()) / channels.std(ddof=1)
        standard[site] = channels.reshape(HEADS, -1).mean(1)
    batches = [padded(data[:3]), padded(data[3:])]
    close(head_importance(model, batches, "flap", metric=metric, normalise=False), plain, 1e-6)
    close(head_importance(model, batches, "flap", metric=metric), standard, 1e-6)


@pytest.mark.parametrize("family", list(OUTPUTS))
def test_projected_outputs(family: str) -> None:
    model, data = make(family), examples(family)
    expected = {}
    for site, projection in OUTPUTS[family].items():
        each, weight = [inputs_of(model, projection, [e]) for e in data], weight_of(family, model, projection)
        dim = weight.shape[1] // HEADS
        parts = [slice(head * dim, (head + 1) * dim) for head in range(HEADS)]
        expected[site] = [
            np.mean([np.abs(x[:, part] @ weight[:, part].T).sum(1).mean() for x in each]) for part in parts
        ]
    close(head_importance(model, [padded(data)], "amp", normalise=False), expected, 1e-5)


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_entropy_of_the_attention_that_the_model_returns(family: str) -> None:
    model, data = make(family), examples(family)
    model.set_attn_implementation("eager")
    rows: dict[str, list[np.ndarray]] = {name: [] for name in OUTPUTS[family]}
    for example in data:
        with torch.no_grad():
            attentions = model(**example, output_attentions=True).attentions
        for name, weights in zip(rows, attentions, strict=True):
            p = weights[0].double().numpy()  # (H, T, T)
            entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
            length = p.shape[-1]
            visible = np.full(length, length) if family == "bert" else np.arange(1, length + 1)
            rows[name].append((1 - entropy[:, visible > 1] / np.log(visible[visible > 1])).T)
    expected = {name: np.concatenate(found).mean(0) for name, found in rows.items()}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        close(head_importance(model, [padded(data)], "entropy", normalise=False), expected, 1e-6)


def test_magnitude_of_all_that_belongs_to_a_head() -> None:
    model = make("llama")
    found = head_importance(model, method="magnitude", normalise=False)
    for name, scores in found.scores.items():
        module = model.get_submodule(name)
        weights = {part: getattr(module, f"{part}_proj").weight.detach().numpy() for part in "qkvo"}
        for head, score in enumerate(scores):
            own, kv = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
            parts = (weights["q"][own], weights["k"][kv], weights["v"][kv], weights["o"][:, own])
            assert score == pytest.approx(math.sqrt(sum((part**2).sum() for part in parts)), rel=1e-5)


def test_magnitude_where_one_projection_makes_queries_keys_and_values() -> None:
    model = make("gpt2")
    found = head_importance(model, method="magnitude", normalise=False)
    for name, scores in found.scores.items():
        module = model.get_submodule(name)
        fused = module.c_attn.weight.detach().numpy().reshape(32, 3, HEADS, 8)
        output = module.c_proj.weight.detach().numpy().reshape(HEADS, 8, 32)
        for head, score in enumerate(scores):
            assert score**2 == pytest.approx((fused[:, :, head] ** 2).sum() + (output[head] ** 2).sum(), rel=1e-5)


def test_random_scores_come_from_the_seed() -> None:
    model = make("llama")
    first, again = head_importance(model, method="random", seed=1), head_importance(model, method="random", seed=1)
    assert first == again
    assert first.scores != head_importance(model, method="random").scores


def test_a_loss_of_ones_own_and_some_sites() -> None:
    model, data = make("llama"), examples("llama")
    site = patchattn.find_sites(model)[1]

    def loss(outputs: Any, batch: Any) -> torch.Tensor:
        return outputs.logits[:, -1].logsumexp(-1).sum()

    found = head_importance(model, data, loss=loss, per="example", normalise=False, sites=[site])
    assert list(found.scores) == [site.name]
    expected = []
    for head in range(HEADS):
        changes = []
        for example in data:
            outputs = []
            for step in (-0.01, 0.01):  # how the loss changes with the gate

                def gate(module: nn.Module, args: Any, head: int = head, step: float = step) -> Any:
                    scale = torch.ones(HEADS, dtype=torch.float64)
                    scale[head] += step
                    return (args[0] * scale.repeat_interleave(8),)

                handle = model.get_submodule(OUTPUTS["llama"][site.name]).register_forward_pre_hook(gate)
                with torch.no_grad():
                    outputs.append(loss(model(input_ids=example["input_ids"]), example).item())
                handle.remove()
            changes.append(abs(outputs[1] - outputs[0]) / 0.02)
        expected.append(np.mean(changes))
    np.testing.assert_allclose(found.scores[site.name], expected, rtol=2e-3)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("method", ["michel", "flap", "amp", "entropy"])
def test_a_killed_pass_goes_on(method: str, tmp_path: Path) -> None:
    model, data, state = make("llama"), examples("llama"), tmp_path / "state"
    whole = head_importance(model, data, method)

    def kill(done: int) -> None:
        if done == 3:
            raise KilledError

    with pytest.raises(KilledError):
        head_importance(model, data, method, state=state, progress=kill)
    forwards: list[int] = []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    assert head_importance(model, iter(data), method, state=state) == whole  # to the last bit
    handle.remove()
    assert len(forwards) == 2
    other = [*examples("llama", 6)[1:]]
    for wrong in (other, data[:2]):
        with pytest.raises(ValueError, match="of other data"):
            head_importance(model, wrong, method, state=state)
    with pytest.raises(ValueError, match="another method, setting or model"):
        head_importance(model, data, method, state=state, normalise=False)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(2.0)
    with pytest.raises(ValueError, match="another method, setting or model"):
        head_importance(model, data, method, state=state)
    state.write_text("{")
    with pytest.raises(ValueError, match="no state"):
        head_importance(model, data, method, state=state)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"method": "michell"}, "did you mean 'michel'"),
        ({"per": "row"}, "token, example, batch"),
        ({"metric": "wifv"}, "'michel' takes per, loss, got metric"),
        ({"method": "flap", "metric": "wfv"}, "wifv, ifv, wifn"),
        ({"method": "magnitude"}, "looks at no data"),
        ({"method": "random", "batches": (), "per": "token"}, "takes seed"),
        ({"batches": []}, "no data"),
        ({"sites": []}, "sites is empty"),
    ],
    ids=str,
)
def test_mistakes(how: dict[str, Any], message: str) -> None:
    arguments = {"batches": examples("llama", 1), **how}
    with pytest.raises(ValueError, match=message):
        head_importance(make("llama"), **arguments)
