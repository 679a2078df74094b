"""SHRP's static form made of the training form: which heads, which gates; saved, undone, exported; dropped layers."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

import patchattn
from patchattn.variants.pruning.shrp import compress, reset_usage

from .behaviour import assert_same, randomise, snapshot
from .experts import (
    DIM,
    ENCODERS,
    MASK,
    TOKENS,
    attention,
    attention_name,
    count,
    encoder,
    in_and_out,
    inputs,
    layers,
    norm,
    reference,
    shrp,
)
from .families import outputs


def trained(family: str, **config: Any) -> nn.Module:
    """A model in the training form, with some usage and queries, keys and values that have moved."""
    model = patchattn.patch_model(encoder(family), "shrp", **config)
    randomise(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "patchattn" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.train()(**inputs(family))
    return model.eval()


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("family", ENCODERS)
def test_compress_keeps_the_most_used_heads_with_their_mean_gates(family: str, heads: int) -> None:
    model = trained(family, heads=heads)
    usage, gates = shrp(model).usage.numpy().copy(), shrp(model).gate_sum.numpy() / 2**20
    before = copy.deepcopy(model)
    assert compress(model) is model
    kept = sorted(np.argsort(-usage, kind="stable")[:heads].tolist())
    assert patchattn.patch_info(model)["patches"][0]["config"]["kept"][attention_name(model, 0)] == kept
    unpatched = patchattn.unpatch_model(before)

    def choose(*_: Any) -> dict[int, float]:
        return {head: gates[head] / usage[head] for head in kept}

    x, got = in_and_out(model, family)
    want = reference(unpatched, family, x, dict(shrp(model).named_parameters()), choose)
    real = MASK.numpy().astype(bool) if family != "vit" else np.ones(x.shape[:2], bool)
    np.testing.assert_allclose(got[real], want[real], rtol=1e-9, atol=1e-9)
    site = next(site for site in patchattn.find_sites(model) if site.layer_index == 0)
    assert (site.query_heads, site.kv_heads, site.head_dim) == (heads, heads, DIM)
    assert not any(module._forward_pre_hooks for name, module in model.named_modules() if "attention" in name)


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_a_certain_router_has_the_output_of_the_static_form(family: str) -> None:
    """All tokens choose one head with gate 1: then nothing is lost."""
    model = patchattn.patch_model(encoder(family), "shrp", router="mean", layers=0)
    randomise(model)
    x, _ = in_and_out(model, family)
    seen = x if family == "bert" else norm(x, layers(model)[0].layernorm_before)
    real = MASK.numpy()[..., None] if family == "bert" else np.ones((*x.shape[:2], 1))
    means = (seen * real).sum(1) / real.sum(1)
    direction = np.linalg.lstsq(means, np.full(len(means), 1e3), rcond=None)[0]  # 1000 on the mean of every row
    with torch.no_grad():
        shrp(model).router_weight.zero_()
        shrp(model).router_weight[2] = torch.from_numpy(direction)
    outputs(model.train(), **inputs(family))
    want = outputs(model.eval(), **inputs(family))[0]
    compress(model)
    assert shrp(model).kept == (2,)
    got = outputs(model, **inputs(family))[0]
    if family == "bert":
        got, want = got[MASK.bool()], want[MASK.bool()]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # the mean gate is kept to 1e-6


def test_heads_can_be_named() -> None:
    model = patchattn.patch_model(encoder("bert"), "shrp", heads=2)
    compress(model, heads={0: [3, 1], "bert.encoder.layer.1.attention.self": [0, 2]})
    assert [shrp(model, layer).kept for layer in (0, 1)] == [(1, 3), (0, 2)]
    plain = encoder("bert").bert.encoder.layer[0].attention.self.value.weight
    rows = [*range(8, 16), *range(24, 32)]
    assert torch.equal(attention(model).value.weight, plain[rows])  # never used: the gates stay 1
    compress(other := patchattn.patch_model(encoder("bert"), "shrp"), heads=[1])
    assert shrp(other, 1).kept == (1,)


@pytest.mark.parametrize(
    ("heads", "error", "message"),
    [
        (None, ValueError, "No head of bert.encoder.layer.0.attention.self was used in training mode"),
        ([4], ValueError, "has 4 heads, counted from 0"),
        ([1, 2], ValueError, "Expected 1 different heads"),
        ({0: [1]}, ValueError, "No heads are given for bert.encoder.layer.1"),
        ({0: [1], 2: [1]}, ValueError, "Heads are given for '2'"),
        ({0: [1], 1: "x"}, TypeError, "list of integers"),
        (3, TypeError, "a list of integers, got 3"),
    ],
)
def test_compress_refuses(heads: Any, error: type[Exception], message: str) -> None:
    model = patchattn.patch_model(encoder("bert"), "shrp")
    before = snapshot(model)
    with pytest.raises(error, match=message):
        compress(model, heads=heads)
    assert_same(before, snapshot(model))


def test_compress_refuses_other_models() -> None:
    with pytest.raises(ValueError, match="no layer in SHRP's training form"):
        compress(encoder("bert"))
    with pytest.raises(ValueError, match="no layer in SHRP's training form"):
        compress(patchattn.patch_model(encoder("bert"), "shrp", kept=[1]))
    with pytest.raises(ValueError, match="also has the variant 'ssmax': compress first"):
        compress(patchattn.patch_model(encoder("bert"), ["shrp", "ssmax"]), heads=[1])
    tuned = get_peft_model(patchattn.patch_model(encoder("bert"), "shrp"), LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="carries adapters"):
        compress(tuned, heads=[1])
    with pytest.raises(ValueError, match="nothing is counted"):
        reset_usage(encoder("bert"))


@pytest.mark.parametrize("dropped", [(), (0,)])
@pytest.mark.parametrize("family", ENCODERS)
def test_saved_and_undone_before_and_after_compress(family: str, dropped: tuple[int, ...], tmp_path: Any) -> None:
    model = encoder(family)
    plain = snapshot(model)
    before = outputs(model, **inputs(family))
    patchattn.patch_model(model, "shrp", layers=1, layers_dropped=dropped)
    randomise(model)
    with torch.no_grad():
        model.train()(**inputs(family))
    for stage in ("training", "static"):
        expected = outputs(model.eval(), **inputs(family))
        model.save_pretrained(tmp_path / stage)
        loaded = patchattn.from_pretrained(tmp_path / stage, dtype="float64")
        for left, right in zip(expected, outputs(loaded, **inputs(family)), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)
        with pytest.raises(ValueError, match="Load the base model instead"):
            patchattn.unpatch_model(loaded)
        patchattn.save_patch(model, tmp_path / f"{stage}_patch")
        fresh = patchattn.load_patch(encoder(family), tmp_path / f"{stage}_patch")
        for left, right in zip(expected, outputs(fresh, **inputs(family)), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)
        if stage == "training":
            for one in (model, loaded):
                compress(one)
            for left, right in zip(outputs(model, **inputs(family)), outputs(loaded, **inputs(family)), strict=True):
                torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)
    with patchattn.unpatched(model):
        for left, right in zip(before, outputs(model, **inputs(family)), strict=True):
            assert torch.equal(left, right)
    for left, right in zip(expected, outputs(model, **inputs(family)), strict=True):
        assert torch.equal(left, right)
    patchattn.unpatch_model(model)
    after = snapshot(model)
    for one in (plain, after):
        del one["config"]  # saving writes the architecture into it
    assert_same(plain, after)


def test_the_static_form_is_exported() -> None:
    model = compress(trained("bert")).float()
    expected = outputs(model, input_ids=TOKENS)[0]
    exported = torch.export.export(model, (), {"input_ids": TOKENS}, strict=False).module()
    torch.testing.assert_close(exported(input_ids=TOKENS).logits, expected)


def test_the_static_form_runs_under_onnx(tmp_path: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = compress(trained("bert")).float()
    expected = outputs(model, input_ids=TOKENS)[0]

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.model(tokens).logits

    torch.onnx.export(Logits().eval(), (TOKENS,), tmp_path / "bert.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "bert.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: TOKENS.numpy()})
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_the_static_form_trains_with_lora_and_other_variants() -> None:
    model = compress(trained("bert").float())
    patchattn.patch_model(model, "ssmax")
    assert attention(model).patchattn.names() == ["shrp", "ssmax"]
    tuned = get_peft_model(model, LoraConfig(target_modules=["query"], modules_to_save=["patchattn"]))
    tuned.train()(**inputs("bert")).logits.pow(2).mean().backward()
    grads = [name for name, p in tuned.named_parameters() if p.grad is not None and "expander_in_weight" in name]
    assert len(grads) == 2


# --- dropped layers


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_dropped_layers_equal_a_shorter_stack(family: str) -> None:
    torch.manual_seed(0)
    kind = {"bert": (tf.BertModel, tf.BertConfig, {"vocab_size": 64}), "vit": (tf.ViTModel, tf.ViTConfig, {})}[family]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4}
    if family == "vit":
        sizes |= {"image_size": 16, "patch_size": 4}
    model = kind[0](kind[1](**sizes, **kind[2])).double().eval()
    short = copy.deepcopy(model)
    stack = short.encoder.layer if family == "bert" else short.layers
    del stack[2:4]
    patchattn.patch_model(short, "shrp", kept=[1], layers=1)
    patchattn.patch_model(model, "shrp", kept=[1], layers=1, layers_dropped=[3, 2])
    for left, right in zip(outputs(model, **inputs(family)), outputs(short, **inputs(family)), strict=True):
        assert torch.equal(left, right)
    assert count(model) == count(short)
