"""Gated attention against its formula, and against the models of transformers that have such gates themselves."""

from typing import Any

import pytest
import torch
import transformers as tf

import patchattn
from patchattn.variants.gating.gated import fold

from .behaviour import variant_parameters
from .families import outputs
from .reference import DIM, HEADS, WIDTH, attend, layer_in_and_out, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13]])
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def with_random_gate(per: str, **settings: Any) -> Any:
    model = patchattn.patch_model(tiny_llama(), "gated", per=per, **settings)
    with torch.no_grad():
        gate = model.model.layers[0].self_attn.patchattn.gated
        gate.weight.copy_(torch.randn_like(gate.weight))
    return model


@pytest.mark.parametrize("factor", [2.0, 1.0])
def test_gates_of_heads_follow_the_formula(factor: float) -> None:
    model = with_random_gate("head", factor=factor)
    module = model.model.layers[0].self_attn
    weight = module.patchattn.gated.weight.detach()
    inputs, got = layer_in_and_out(model, TOKENS)
    want = attend(module, inputs[0], gate=lambda x, q: (factor / (1 + (-(weight @ torch.tensor(x))).exp())).numpy())
    torch.testing.assert_close(torch.tensor(got[0]), torch.tensor(want), rtol=1e-6, atol=1e-8)


def test_gates_of_channels_follow_the_formula() -> None:
    model = with_random_gate("element")
    module = model.model.layers[0].self_attn
    weight = module.patchattn.gated.weight.detach()
    inputs, got = layer_in_and_out(model, TOKENS)
    want, plain = torch.zeros(7, WIDTH, dtype=torch.float64), module.o_proj.weight.detach().clone()
    for channel in range(HEADS * DIM):  # what one channel of one head gives, times its gate
        with torch.no_grad():
            module.o_proj.weight.zero_()[:, channel] = plain[:, channel]
        part = torch.tensor(attend(module, inputs[0]))
        opening = torch.tensor(inputs[0]) @ weight[channel]
        want += part * (2 / (1 + (-opening).exp()))[:, None]
    torch.testing.assert_close(torch.tensor(got[0]), want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("per", "count"), [("head", HEADS * WIDTH), ("element", HEADS * DIM * WIDTH)])
def test_it_starts_at_the_model_to_the_last_bit_and_every_weight_learns(per: str, count: int) -> None:
    model = tiny_llama()
    before = outputs(model, input_ids=TOKENS)[0]
    patchattn.patch_model(model, "gated", per=per)
    assert patchattn.patch_info(model)["extra_parameters"] == count
    logits = model(TOKENS).logits
    assert torch.equal(logits, before)
    (logits * torch.randn_like(logits)).sum().backward()
    (weight,) = variant_parameters(model).values()
    assert bool((weight.grad.abs() > 0).all())


def test_the_form_of_the_paper() -> None:
    model = patchattn.patch_model(tiny_llama(), "gated", preset="paper")
    gated = model.model.layers[0].self_attn.patchattn.gated
    assert gated.weight.shape == (HEADS * DIM, WIDTH)
    assert gated.fast_parameters() == [gated.weight]
    seen: list[patchattn.Observation] = []
    with patchattn.observe(model, seen.append):
        model(TOKENS)
    assert bool((seen[0].values["gate"] == 0.5).all())


def qwen3_next(**sizes: Any) -> Any:
    torch.manual_seed(0)
    config = tf.Qwen3NextConfig(
        **{**SIZES, **sizes}, layer_types=["full_attention"], mlp_only_layers=[0], partial_rotary_factor=1.0
    )
    model = tf.Qwen3NextForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def of_qwen3_next(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of a Qwen3-Next as those of a Qwen3 and the gate: norms there are `1 + w`, q_proj holds both by head."""
    found = {name: tensor + 1 if name.endswith("norm.weight") else tensor for name, tensor in weights.items()}
    both = found.pop("model.layers.0.self_attn.q_proj.weight").view(HEADS, 2, DIM, WIDTH)
    found["model.layers.0.self_attn.q_proj.weight"] = both[:, 0].reshape(-1, WIDTH)
    return {**found, "gate": both[:, 1].reshape(-1, WIDTH)}


def test_a_qwen3_with_the_weights_of_qwen3_next_gives_what_it_gives() -> None:
    native = qwen3_next()
    weights = of_qwen3_next(native.state_dict())
    gate = weights.pop("gate")
    sibling = tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES)).double().eval()
    sibling.load_state_dict(weights)
    without = outputs(sibling, input_ids=TOKENS)[0]
    patchattn.patch_model(sibling, "gated", preset="paper")
    with torch.no_grad():
        sibling.model.layers[0].self_attn.patchattn.gated.weight.copy_(gate)
    got, want = (outputs(model, input_ids=TOKENS)[0] for model in (sibling, native))
    assert float((without - want).abs().max()) > 1e-3
    torch.testing.assert_close(got, want, rtol=5e-6, atol=1e-6)  # norms there are float32 inside


def test_a_folded_gate_is_what_qwen3_next_computes() -> None:
    """The other way round: a patched Qwen3, whose sigmoid is doubled, written into the native layout."""
    native = qwen3_next()
    weights = of_qwen3_next(native.state_dict())
    gate = weights.pop("gate")
    sibling = tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES)).double().eval()
    sibling.load_state_dict(weights)
    patchattn.patch_model(sibling, "gated", per="element")
    with torch.no_grad():
        sibling.model.layers[0].self_attn.patchattn.gated.weight.copy_(gate.flip(0))
    before = {name: tensor.clone() for name, tensor in sibling.state_dict().items() if isinstance(tensor, torch.Tensor)}
    folded = fold(sibling)
    assert folded.keys() == {"model.layers.0.self_attn.gate.weight", "model.layers.0.self_attn.o_proj.weight"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in sibling.state_dict().items() if name in before)
    attention = native.model.layers[0].self_attn
    with torch.no_grad():
        both = attention.q_proj.weight.view(HEADS, 2, DIM, WIDTH)
        both[:, 1] = folded["model.layers.0.self_attn.gate.weight"].view(HEADS, DIM, WIDTH)
        attention.o_proj.weight.copy_(folded["model.layers.0.self_attn.o_proj.weight"])
    got, want = (outputs(model, input_ids=TOKENS)[0] for model in (sibling, native))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_a_qwen3_attention_with_the_gate_of_step3p7_gives_what_that_gives() -> None:
    from transformers.models.step3p7 import modeling_step3p7 as step
    from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig

    torch.manual_seed(0)
    config = Step3p7TextConfig(**SIZES, layer_types=["full_attention"], gating="per-head")
    config._attn_implementation = "sdpa"
    theirs = step.Step3p7Attention(config, 0).double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    sibling = tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES, rms_norm_eps=config.rms_norm_eps)).double().eval()
    patchattn.patch_model(sibling, "gated", factor=1.0)
    ours = sibling.model.layers[0].self_attn
    weights = theirs.state_dict()
    gate = weights.pop("g_proj.weight")
    norms = {name: weights[name] + 1 for name in ("q_norm.weight", "k_norm.weight")}  # stored less 1 there
    found = ours.load_state_dict({**weights, **norms}, strict=False)
    assert not found.unexpected_keys
    assert all("patchattn" in name for name in found.missing_keys)
    with torch.no_grad():
        ours.patchattn.gated.weight.copy_(gate)
    states = torch.randn(2, 7, 32, dtype=torch.float64)
    tables = sibling.model.rotary_emb(states, torch.arange(7)[None])
    given: dict[str, Any] = {"hidden_states": states, "position_embeddings": tables, "attention_mask": None}
    torch.testing.assert_close(ours(**given)[0], theirs(**given)[0], rtol=0, atol=1e-6)


def test_gates_of_channels_refuse_values_of_another_width() -> None:
    model = patchattn.patch_model(tiny_llama(), "gated", per="element")
    gated = model.model.layers[0].self_attn.patchattn.gated

    def narrow(call: Any) -> Any:
        return call.value.transpose(1, 2)[..., :4].repeat(1, 1, 2, 1), None

    def see(call: Any, output: torch.Tensor) -> torch.Tensor:
        with pytest.raises(NotImplementedError, match=r"8 gates for every head .* 4 wide: gate whole heads"):
            gated.attend(call, narrow)
        return output

    with patchattn.probed(model, see):
        model(TOKENS)


def test_fold_needs_a_gate() -> None:
    with pytest.raises(ValueError, match="carries gated attention"):
        fold(patchattn.patch_model(tiny_llama(), "ssmax"))
