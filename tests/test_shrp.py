"""SHRP against its formulas, computed in numpy; its counts of parameters, its losses, and what it refuses."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

import patchattn
from patchattn.variants.pruning.shrp import reset_usage

from .behaviour import assert_same, randomise, snapshot
from .experts import (
    DIM,
    HEADS,
    MASK,
    WIDTH,
    attention,
    attention_name,
    count,
    encoder,
    in_and_out,
    inputs,
    layers,
    reference,
    shrp,
    softmax,
    top,
)
from .families import FAMILIES, outputs


@pytest.mark.parametrize("router", ["token", "first", "mean"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_training_form(family: str, heads: int, router: str) -> None:
    model, plain = encoder(family), encoder(family)
    patchattn.patch_model(model, "shrp", heads=heads, router=router, layers=0)
    randomise(model)
    weight = shrp(model).router_weight.detach().numpy()

    def choose(row: np.ndarray, token: int, real: np.ndarray) -> dict[int, float]:
        seen = {"token": row[token], "first": row[real][0], "mean": row[real].mean(0)}[router]
        return top(softmax(weight @ seen), heads)

    x, got = in_and_out(model, family)
    want = reference(plain, family, x, dict(shrp(model).named_parameters()), choose)
    real = MASK.numpy().astype(bool) if family == "bert" else np.ones(x.shape[:2], bool)
    np.testing.assert_allclose(got[real], want[real], rtol=1e-9, atol=1e-10)
    assert np.abs(got - in_and_out(plain, family)[1]).max() > 0.1


@pytest.mark.parametrize("kept", [[2], [0, 3]])
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_static_form(family: str, kept: list[int]) -> None:
    model, plain = encoder(family), encoder(family)
    patchattn.patch_model(model, "shrp", heads=len(kept), kept={0: kept}, layers=0)
    randomise(model)
    x, got = in_and_out(model, family)
    want = reference(plain, family, x, dict(shrp(model).named_parameters()), lambda *_: dict.fromkeys(kept, 1.0))
    real = MASK.numpy().astype(bool) if family == "bert" else np.ones(x.shape[:2], bool)
    np.testing.assert_allclose(got[real], want[real], rtol=1e-9, atol=1e-10)
    assert not attention(model)._forward_pre_hooks


# --- counts


def per_layer(width: int, heads: int, dim: int, size: int) -> int:
    """q, k and v of the heads kept, and the expander, biases counted."""
    return 3 * heads * (width * dim + dim) + dim * size + size + size * width + width


def bert_base() -> nn.Module:
    with torch.device("meta"):
        return tf.BertModel(tf.BertConfig())


def test_the_published_parameter_point() -> None:
    model, before = bert_base(), 109_482_240
    assert count(model) == before
    assert per_layer(768, 1, 64, 3072) == 2_707_392
    patchattn.patch_model(model, "shrp", kept=[0])
    expected = before - 12 * (7_087_872 - 2 * 768 - 2_707_392)  # one of two norms stays
    assert count(model) == expected == 56_934_912
    assert round(100 * (1 - expected / before), 1) == 48.0
    assert not any("usage" in name or "router" in name for name in model.state_dict())


def test_the_published_point_of_one_dense_and_one_converted_layer() -> None:
    model = bert_base()
    layers_before = count(model.encoder)
    patchattn.patch_model(model, "shrp", kept=[0], layers=1, layers_dropped=range(2, 12))
    assert count(model.encoder) == 7_087_872 + 2_707_392 + 2 * 768
    assert count(model.encoder) / layers_before == pytest.approx(0.115, abs=5e-4)
    inner = [name for name, _ in model.named_modules() if name.endswith("attention.self")]
    assert inner == ["encoder.layer.0.attention.self", "encoder.layer.1.attention.self"]


@settings(max_examples=12, deadline=None)
@given(kept=st.sets(st.integers(0, 3), min_size=1, max_size=3), size=st.integers(1, 48))
def test_parameters_by_formula(kept: set[int], size: int) -> None:
    model = FAMILIES["bert"].make()
    before = count(model)
    dense = 4 * (WIDTH * WIDTH + WIDTH) + 2 * WIDTH * 48 + 48 + WIDTH + 4 * WIDTH
    patchattn.patch_model(model, "shrp", heads=len(kept), kept=sorted(kept), expander_size=size, layers=1)
    assert count(model) == before - dense + per_layer(WIDTH, len(kept), DIM, size) + 2 * WIDTH


# --- where the expander starts


@pytest.mark.parametrize("weights", [None, [0.0, 3.0, 1.0, 0.0]])
@pytest.mark.parametrize("family", ["bert", "vit"])
def test_the_expander_starts_from_the_layer(family: str, weights: list[float] | None) -> None:
    model, plain = encoder(family), encoder(family)
    importance = None if weights is None else {attention_name(model, 0): weights}
    patchattn.patch_model(model, "shrp", layers=0, importance=importance)
    layer, module = layers(plain)[0], attention(plain)
    parts = (
        (module.o_proj, layer.mlp.fc1, layer.mlp.fc2)
        if family == "vit"
        else (layer.attention.output.dense, layer.intermediate.dense, layer.output.dense)
    )
    out, maker, reader = ((p.weight.detach().numpy(), p.bias.detach().numpy()) for p in parts)
    share = np.full(HEADS, 0.25) if weights is None else np.array(weights) / sum(weights)
    mean = sum(share[h] * out[0][:, h * DIM : (h + 1) * DIM] for h in range(HEADS))
    own = {name: p.detach().numpy() for name, p in shrp(model).named_parameters()}
    np.testing.assert_allclose(own["expander_in_weight"], maker[0] @ mean, rtol=1e-10)
    np.testing.assert_allclose(own["expander_in_bias"], maker[0] @ out[1] + maker[1], rtol=1e-10)
    np.testing.assert_array_equal(own["expander_out_weight"], reader[0])
    np.testing.assert_array_equal(own["expander_out_bias"], reader[1])


def test_a_smaller_expander_starts_from_the_strongest_channels() -> None:
    model, plain = encoder("bert"), encoder("bert")
    patchattn.patch_model(model, "shrp", layers=0, expander_size=10)
    layer = layers(plain)[0]
    maker, reader = (p.weight.detach().numpy() for p in (layer.intermediate.dense, layer.output.dense))
    strength = np.linalg.norm(maker, axis=1) * np.linalg.norm(reader, axis=0)
    channels = np.sort(np.argsort(-strength)[:10])
    np.testing.assert_array_equal(shrp(model).expander_out_weight.detach().numpy(), reader[:, channels])
    assert shrp(model).expander_in_weight.shape == (10, DIM)


def test_importance_from_a_file(tmp_path: Any) -> None:
    model = encoder("bert")
    scores = patchattn.head_importance(model, [], method="magnitude")
    scores.save(tmp_path / "scores.json")
    patchattn.patch_model(model, "shrp", importance=str(tmp_path / "scores.json"))
    (tmp_path / "scores.json").unlink()
    other = patchattn.patch_model(encoder("bert"), "shrp", importance=scores.scores)
    assert torch.equal(shrp(model).expander_in_weight, shrp(other).expander_in_weight)
    patchattn.save_patch(model, tmp_path)
    patchattn.load_patch(encoder("bert"), tmp_path)  # does not need the file


# --- usage


def brute_usage(model: nn.Module, family: str) -> tuple[np.ndarray, np.ndarray]:
    """How often each head of the first layer is chosen, and its mean gate then."""
    x = torch.from_numpy(in_and_out(model, family)[0]).numpy()
    weight = shrp(model).router_weight.detach().numpy()
    scores = softmax(x @ weight.T)[MASK.numpy().astype(bool)]
    chosen = scores.argmax(-1)
    counts = np.bincount(chosen, minlength=HEADS)
    gates = [scores[chosen == head, head].mean() if counts[head] else np.nan for head in range(HEADS)]
    return counts, np.array(gates)


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_usage_counts_every_real_token_once(checkpointing: bool | None) -> None:
    model = encoder("bert")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    patchattn.patch_model(model, "shrp")
    randomise(model)
    outputs(model, **inputs("bert"))
    assert shrp(model).usage.tolist() == [0] * HEADS  # not in evaluation
    counts, gates = brute_usage(model, "bert")
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    model.train()
    for _ in range(3):
        model(**inputs("bert")).logits.pow(2).mean().backward()
    assert shrp(model).usage.tolist() == (3 * counts).tolist()
    used = np.flatnonzero(counts)
    np.testing.assert_allclose(shrp(model).mean_gates(used.tolist()).numpy(), gates[used], rtol=1e-4)
    model.bfloat16()
    assert shrp(model).usage.tolist() == (3 * counts).tolist()
    reset_usage(model)
    assert int(shrp(model).usage.sum()) == int(shrp(model).gate_sum.sum()) == 0


# --- losses


def test_losses_on_routers() -> None:
    model = patchattn.patch_model(encoder("bert"), "shrp", layers=0)
    randomise(model)
    x, _ = in_and_out(model, "bert")
    probability = softmax(x @ shrp(model).router_weight.detach().numpy().T)[MASK.numpy().astype(bool)]
    mean = probability.mean(0)
    load = np.bincount(probability.argmax(-1), minlength=HEADS) / len(probability)
    with (
        patchattn.balance_loss(model, 0.5, "released") as balance,
        patchattn.specialise_loss(model, 0.25) as specialise,
    ):
        model(**inputs("bert"))
    assert balance().item() == pytest.approx(0.5 * HEADS * (mean * load).sum())
    assert specialise().item() == pytest.approx(0.25 * -(mean * np.log(mean)).sum())
    with pytest.raises(ValueError, match="must be a number of at least 0"), patchattn.specialise_loss(model, -1.0):
        pass
    with pytest.raises(ValueError, match="chooses heads"), patchattn.specialise_loss(encoder("bert")):
        pass


@pytest.mark.parametrize("stage", ["balance", "specialise"])
def test_the_stages_do_what_they_are_for(stage: str) -> None:
    """On the router alone: balancing evens out the use of heads, specialising makes one win."""
    model = patchattn.patch_model(encoder("bert"), "shrp", layers=0)
    torch.manual_seed(3)
    router = shrp(model).router_weight
    nn.init.normal_(router, std=0.2 if stage == "balance" else 0.02)
    optimizer = torch.optim.Adam([router], lr=0.02)
    tokens = torch.randint(3, 60, (16, 9), generator=torch.Generator().manual_seed(4))

    def share() -> float:
        with patchattn.routing_statistics(model) as statistics:
            model(tokens)
        return max(statistics.usage()[0])

    start = share()
    for _ in range(60):
        loss = patchattn.specialise_loss(model, 1.0) if stage == "specialise" else patchattn.balance_loss(model, 1.0)
        with loss as collected:
            model(tokens)
        optimizer.zero_grad()
        collected().backward()
        optimizer.step()
    if stage == "balance":
        assert share() < min(start, 0.45)
    else:
        assert share() > max(start, 0.95)


# --- refusals


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("llama", "does not support causal"),
        ("distilbert", "not arranged as in BERT or as in ViT"),
        ("modernbert", "separate projections"),
        ("dinov2", "not arranged as in BERT or as in ViT"),
    ],
)
def test_other_layers_are_refused(family: str, message: str) -> None:
    model = FAMILIES[family].make()
    before = snapshot(model)
    with pytest.raises(NotImplementedError, match=message):
        patchattn.patch_model(model, "shrp")
    assert_same(before, snapshot(model))


def test_a_decoder_of_berts_kind_is_refused() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    for extra in ({}, {"add_cross_attention": True}):
        model = tf.BertLMHeadModel(tf.BertConfig(**sizes, is_decoder=True, vocab_size=64, **extra))
        with pytest.raises(NotImplementedError, match="does not support causal"):
            patchattn.patch_model(model, "shrp")


def test_adapters_come_after() -> None:
    model = get_peft_model(encoder("bert"), LoraConfig(target_modules=["query"]))
    with pytest.raises(NotImplementedError, match="not a plain linear layer; adapters"):
        patchattn.patch_model(model, "shrp")


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"heads": 5}, ValueError, "has 4 heads, counted from 0; got heads=5"),
        ({"kept": [4]}, ValueError, r"has 4 heads, counted from 0; got kept=\[4\]"),
        ({"kept": [1, 2]}, ValueError, "Expected 1 different heads"),
        ({"kept": {0: [1]}}, ValueError, "No heads are given for bert.encoder.layer.1"),
        ({"kept": {"bert.x": [1]}}, ValueError, "Heads are given for 'bert.x'"),
        ({"kept": {0: 1}}, TypeError, "a list of integers"),
        ({"layers_dropped": [1]}, ValueError, "Layer 1 is to be dropped and converted"),
        ({"layers_dropped": [2]}, ValueError, "There is no layer 2 to drop"),
        ({"layers_dropped": ["a"]}, TypeError, "layers_dropped must be"),
        ({"layers_dropped": "2"}, TypeError, "layers_dropped must be"),
        ({"heads": 0, "layers_dropped": [1]}, ValueError, "heads=0 leaves every layer"),
        ({"expander_size": 49}, ValueError, "expander_size must be at most 48"),
        ({"activation": "geluu"}, ValueError, "transformers' names"),
        ({"router": "last"}, (ValueError, TypeError), "router"),
        ({"importance": "nowhere.json"}, ValueError, "There is no file 'nowhere.json'"),
        ({"importance": 3}, TypeError, "importance must be"),
        ({"importance": {}}, ValueError, "4 numbers of at least 0"),
    ],
)
def test_bad_settings(config: dict[str, Any], error: Any, message: str) -> None:
    model = encoder("bert")
    before = snapshot(model)
    with pytest.raises(error, match=message):
        patchattn.patch_model(model, "shrp", **config)
    assert_same(before, snapshot(model))


def test_a_dropped_layer_may_not_carry_variants() -> None:
    model = patchattn.patch_model(encoder("bert"), "ssmax", layers=0)
    with pytest.raises(ValueError, match="carries variants: unpatch it first"):
        patchattn.patch_model(model, "shrp", layers=1, layers_dropped=[0])


def test_towers_that_differ_are_converted_one_at_a_time() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {**sizes, "intermediate_size": 40, "vocab_size": 64, "max_position_embeddings": 9, "projection_size": 32}
    vision = {**sizes, "intermediate_size": 48, "image_size": 16, "patch_size": 4}
    model = tf.SiglipModel(tf.SiglipConfig(text_config=text, vision_config=vision))
    with pytest.raises(ValueError, match="one tower at a time"):
        patchattn.patch_model(model, "shrp")
    patchattn.patch_model(model, "shrp", modules="vision_model")
