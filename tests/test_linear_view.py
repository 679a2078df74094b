"""The one view of a linear layer, against what the layer itself computes; what has no such numbers is refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)
from transformers.integrations.bitnet import AutoBitLinear
from transformers.integrations.finegrained_fp8 import FP8Linear
from transformers.pytorch_utils import Conv1D

import patchattn
from patchattn.core.linear import LinearView, Storage
from patchattn.inspection.channels import projection_weight
from patchattn.surgery.projections import head_projections

from .families import FAMILIES, outputs

IN, OUT = 6, 8
INPUT = torch.randn(3, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Quantised(torch.Tensor):
    """A tensor of another type that says it is floating-point."""


class Clipped(nn.Linear):
    """A layer with the weight of a linear one that computes something else."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens.clamp(-0.1, 0.1))


class Renamed(nn.Linear):
    """A layer of another type that computes the same."""


def conv1d() -> Conv1D:
    layer = Conv1D(OUT, IN)
    nn.init.normal_(layer.bias)
    return layer


def parametrised() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(IN, OUT))


def hooked() -> nn.Module:
    """As accelerate leaves a layer that it no longer holds."""
    holder = nn.Sequential(nn.Linear(IN, OUT))
    cpu_offload(holder, execution_device=torch.device("cpu"))
    remove_hook_from_submodules(holder)
    return holder[0]


def dispatched() -> nn.Module:
    holder = nn.Sequential(nn.Linear(IN, OUT))
    return dispatch_model(holder, {"0": "cpu"}, main_device="cpu", force_hooks=True)[0]


def on_cpu() -> nn.Module:
    holder = nn.Sequential(nn.Linear(IN, OUT).double())
    return cpu_offload(holder, execution_device=torch.device("cpu"))[0]


def on_cpu_inputs_first() -> nn.Module:
    return cpu_offload(nn.Sequential(conv1d().double()), execution_device=torch.device("cpu"))[0]


def adapted(layer: nn.Module, **settings: Any) -> Any:
    config = LoraConfig(
        r=2, target_modules=["0"], init_lora_weights=False, fan_in_fan_out=isinstance(layer, Conv1D), **settings
    )
    return get_peft_model(nn.Sequential(layer), config)


READ: dict[str, tuple[Callable[[], nn.Module], Storage]] = {
    "torch's": (lambda: nn.Linear(IN, OUT), "plain"),
    "without a bias": (lambda: nn.Linear(IN, OUT, bias=False), "plain"),
    "subclass": (lambda: Renamed(IN, OUT), "plain"),
    "inputs first": (conv1d, "plain"),
    "parametrised": (parametrised, "plain"),
    "hooked before": (hooked, "plain"),
    "dispatched": (dispatched, "dispatched"),
    "offloaded": (on_cpu, "dispatched"),
    "offloaded, inputs first": (on_cpu_inputs_first, "dispatched"),
    "LoRA, merged": (lambda: adapted(nn.Linear(IN, OUT)).merge_and_unload()[0], "plain"),
    "LoRA, inputs first, merged": (lambda: adapted(conv1d()).merge_and_unload()[0], "plain"),
    "DoRA, merged": (lambda: adapted(nn.Linear(IN, OUT), use_dora=True).merge_and_unload()[0], "plain"),
}


@pytest.mark.parametrize(("make", "storage"), READ.values(), ids=READ)
@torch.no_grad()
def test_it_computes_what_the_layer_does(make: Callable[[], nn.Module], storage: Storage) -> None:
    layer = make()
    layer = layer if storage == "dispatched" and layer.weight.is_meta else layer.double()  # type: ignore[union-attr]
    view = LinearView.of(layer, "there")
    assert view is not None
    assert (view.in_features, view.out_features, view.storage) == (IN, OUT, storage)
    assert (view.weight.shape, view.bias.shape) == ((OUT, IN), (OUT,))
    torch.testing.assert_close(INPUT @ view.weight.T + view.bias, layer(INPUT), rtol=0, atol=1e-12)
    assert not view.weight.requires_grad


def test_an_offloaded_layer_stays_offloaded(tmp_path: Path) -> None:
    holder = nn.Sequential(nn.Linear(IN, OUT).double())
    plain = copy.deepcopy(holder[0])
    disk_offload(holder, tmp_path, execution_device=torch.device("cpu"))
    view = LinearView.at(holder, "0")
    assert torch.equal(view.weight, plain.weight)
    assert torch.equal(view.bias, plain.bias)
    assert holder[0].weight.is_meta
    assert torch.equal(holder(INPUT), plain(INPUT))


@pytest.mark.parametrize("side", ["rows", "columns"])
@pytest.mark.parametrize("make", [lambda: nn.Linear(IN, OUT), conv1d], ids=["torch's", "inputs first"])
@torch.no_grad()
def test_what_is_cut_computes_the_rest(make: Callable[[], nn.Module], side: Any) -> None:
    layer, index = make().double(), torch.tensor([0, 3, 4])
    whole = copy.deepcopy(layer)
    layer.weight.requires_grad_(False)
    for name, value in LinearView.at(nn.Sequential(layer), "0").cut(side, index).items():
        setattr(layer, name, value)
    if side == "rows":
        torch.testing.assert_close(layer(INPUT), whole(INPUT)[:, index], rtol=0, atol=1e-12)
    else:
        zeroed = torch.zeros_like(INPUT)
        zeroed[:, index] = INPUT[:, index]
        torch.testing.assert_close(layer(INPUT[:, index]), whole(zeroed), rtol=0, atol=1e-12)
    assert (layer.weight.requires_grad, layer.bias.requires_grad) == (False, True)
    view = LinearView.of(layer)
    assert view is not None
    assert (view.in_features, view.out_features) == ((IN, 3) if side == "rows" else (3, OUT))


def in_blocks(output: torch.Tensor) -> dict[str, torch.Tensor]:
    """All queries, then all keys, then all values, of 4 heads of 8."""
    query, key, value = output.split(32, dim=-1)
    return {"query": query.view(-1, 4, 8), "key": key.view(-1, 4, 8), "value": value.view(-1, 4, 8)}


def in_groups(output: torch.Tensor) -> dict[str, torch.Tensor]:
    """As `in_blocks`, of 4 query heads and 2 kv heads."""
    query, key, value = output.split([32, 16, 16], dim=-1)
    return {"query": query.view(-1, 4, 8), "key": key.view(-1, 2, 8), "value": value.view(-1, 2, 8)}


def by_head(output: torch.Tensor) -> dict[str, torch.Tensor]:
    """Query, key and value of the first head, then of the second, ..."""
    return dict(zip(("query", "key", "value"), output.view(-1, 4, 3, 8).unbind(2), strict=True))


TEXT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
FUSED = {
    "inputs first": (lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64)), in_blocks),
    "groups": (lambda: Phi3ForCausalLM(Phi3Config(**TEXT, num_key_value_heads=2, pad_token_id=0)), in_groups),
    "by head": (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**TEXT)), by_head),
}


@pytest.mark.parametrize(("make", "layout"), FUSED.values(), ids=FUSED)
@torch.no_grad()
def test_slices_of_a_fused_projection(make: Callable[[], Any], layout: Callable[..., Any]) -> None:
    model = make().double()
    (site,) = patchattn.find_sites(model)
    parts = [part for part in head_projections(model, site) if part.side == "rows"]
    view = LinearView.at(model, parts[0].projection)
    tokens = torch.randn(5, 32, dtype=torch.float64)
    expected = layout(view.module(tokens))
    assert [part.of for part in parts] == ["query", "kv", "kv"]
    for part, whole in zip(parts, (expected["query"], expected["key"], expected["value"]), strict=True):
        for head, index in enumerate(part.index):
            found = tokens @ view.weight[index].T + view.bias[index]
            torch.testing.assert_close(found, whole[:, head], rtol=0, atol=1e-12)


def quantised_tensor() -> nn.Module:
    layer = nn.Linear(IN, OUT)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantised), requires_grad=False)
    return layer


def replaced() -> nn.Module:
    layer = nn.Linear(IN, OUT)
    layer.forward = lambda tokens: tokens  # type: ignore[method-assign]
    return layer


def by_torchao() -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(nn.Linear(IN, OUT))
    quantization.quantize_(holder, quantization.Int8WeightOnlyConfig())
    return holder[0]


def by_quanto() -> nn.Module:
    quanto = pytest.importorskip("optimum.quanto")
    holder = nn.Sequential(nn.Linear(IN, OUT))
    quanto.quantize(holder, weights=quanto.qint8)
    return holder[0]


def offloaded_adapter() -> nn.Module:
    model = adapted(nn.Linear(IN, OUT)).base_model.model
    cpu_offload(model, execution_device=torch.device("cpu"))
    return model[0]


REFUSED: dict[str, tuple[Callable[[], nn.Module], Storage, type[Exception], str]] = {
    "LoRA": (lambda: adapted(nn.Linear(IN, OUT)).base_model.model[0], "adapted", ValueError, "carries a PEFT adapter"),
    "LoRA, inputs first": (lambda: adapted(conv1d()).base_model.model[0], "adapted", ValueError, "a PEFT adapter"),
    "DoRA": (
        lambda: adapted(nn.Linear(IN, OUT), use_dora=True).base_model.model[0],
        "adapted",
        ValueError,
        "a PEFT adapter",
    ),
    "LoRA, offloaded": (offloaded_adapter, "adapted", ValueError, "carries a PEFT adapter"),
    "a tensor of another type": (quantised_tensor, "quantised", NotImplementedError, "is quantised or not a plain"),
    "float8 with scales": (lambda: FP8Linear(IN, OUT), "quantised", NotImplementedError, "is quantised or not a plain"),
    "ternary in each call": (
        lambda: AutoBitLinear(IN, OUT, online_quant=True),
        "quantised",
        NotImplementedError,
        "is quantised or not",
    ),
    "float8": (
        lambda: nn.Linear(IN, OUT).to(torch.float8_e4m3fn),
        "quantised",
        NotImplementedError,
        "is quantised or not",
    ),
    "a forward of its own": (lambda: Clipped(IN, OUT), "quantised", NotImplementedError, "not a plain linear layer"),
    "a forward put in": (replaced, "quantised", NotImplementedError, "not a plain linear layer"),
    "weight_norm by hooks": (
        lambda: nn.utils.weight_norm(nn.Linear(IN, OUT)),
        "quantised",
        NotImplementedError,
        "not a plain linear layer",
    ),
    "torchao": (by_torchao, "quantised", NotImplementedError, "is quantised or not a plain linear layer"),
    "quanto": (by_quanto, "quantised", NotImplementedError, "is quantised or not a plain linear layer"),
}


@pytest.mark.parametrize(("make", "storage", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_other_numbers_are_refused(
    make: Callable[[], nn.Module], storage: Storage, error: type[Exception], text: str
) -> None:
    view = LinearView.of(make(), "some.layer")
    assert view is not None
    assert (view.in_features, view.out_features, view.storage) == (IN, OUT, storage)
    index = torch.arange(2)
    for use in (lambda: view.weight, lambda: view.bias, lambda: view.cut("rows", index), view.check_cut):
        with pytest.raises(error, match=f"^some.layer .*{text}"):
            use()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (on_cpu, "some.layer is offloaded or dispatched by accelerate: prune before that"),
        (dispatched, "some.layer is offloaded or dispatched by accelerate: prune before that"),
        (parametrised, "some.layer computes its weight from other tensors: prune before"),
    ],
    ids=["offloaded", "dispatched", "parametrised"],
)
def test_what_can_be_read_and_not_cut(make: Callable[[], nn.Module], text: str) -> None:
    view = LinearView.of(make(), "some.layer")
    assert view is not None
    with pytest.raises(NotImplementedError, match=text):
        view.cut("rows", torch.arange(2))


def test_what_is_not_linear() -> None:
    for module in (nn.Embedding(4, 5), nn.Conv1d(4, 5, 1), nn.LayerNorm(4), nn.Identity()):
        assert LinearView.of(module) is None
    with pytest.raises(NotImplementedError, match=r"^0 \(Embedding\) is quantised or not a plain linear layer"):
        LinearView.at(nn.Sequential(nn.Embedding(4, 5)), "0")


def test_a_layer_without_values() -> None:
    """Its shapes are known while a model is built without memory, and its parts too."""
    holder = nn.Sequential(nn.Linear(IN, OUT, device="meta"))
    view = LinearView.at(holder, "0")
    assert (view.storage, view.weight.is_meta, view.bias.is_meta) == ("plain", True, True)
    assert view.cut("columns", torch.arange(2))["weight"].shape == (OUT, 2)
    with pytest.raises(NotImplementedError, match="0 has no values here: its weight is on the device 'meta'"):
        projection_weight(holder, "0")


@pytest.mark.parametrize("method", ["amp", "flap"])
def test_heads_of_an_offloaded_model_are_scored(method: Any) -> None:
    inputs = FAMILIES["qwen3"].inputs()
    model = FAMILIES["qwen3"].make()
    expected = patchattn.head_importance(model, [inputs], method).scores
    before = outputs(model, **inputs)[0]
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert patchattn.head_importance(model, [inputs], method).scores == expected
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(outputs(model, **inputs)[0], before)
