"""QK-norm against the formula in float64, against Qwen3, whose norms are learned in training, and in steps."""

from typing import Any

import pytest
import torch
import transformers as tf

import patchattn

from .behaviour import variant_parameters
from .families import outputs
from .reference import HEADS, KV_HEADS, attend, layer_in_and_out, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13]])
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def test_logits_follow_the_formula() -> None:
    """Weights of one head are softmax over `q k (g_q / |q|)^p_q (g_k / |k|)^p_k`, by loops over queries and keys."""
    torch.manual_seed(0)
    model = tiny_llama()
    seen: list[Any] = []
    with torch.no_grad(), patchattn.probed(model, lambda call, output: seen.append(call)):
        model(TOKENS)
    plain = seen[0]
    patchattn.patch_model(model, "qk_norm")
    variant = model.model.layers[0].self_attn.patchattn.qk_norm
    with torch.no_grad():
        for name, parameter in variant.named_parameters():
            parameter.copy_(torch.rand_like(parameter) * (1.0 if "exponent" in name else 3.0) + 0.1)
        got: list[torch.Tensor] = []
        with patchattn.probed(model, lambda call, output: got.append(output)):
            model(TOKENS)
    parameters = {name: tensor.detach() for name, tensor in variant.named_parameters()}

    def scaled(vector: torch.Tensor, stream: str, head: int) -> torch.Tensor:
        rms = float((vector @ vector) / len(vector) + 1e-6) ** 0.5
        return vector * (float(parameters[f"{stream}_norm"][head]) / rms) ** float(
            parameters[f"{stream}_exponent"][head]
        )

    for head in range(HEADS):
        group = head // (HEADS // KV_HEADS)
        for i in range(TOKENS.shape[1]):
            query = scaled(plain.query[0, head, i], "query", head)
            logits = [query @ scaled(plain.key[0, group, j], "key", group) * plain.scaling for j in range(i + 1)]
            want = torch.stack(logits).softmax(-1) @ plain.value[0, group, : i + 1]
            torch.testing.assert_close(got[0][0, i, head], want, rtol=0, atol=1e-9)


def test_it_starts_at_the_model_and_everything_learns_by_the_second_step() -> None:
    model = tiny_llama()
    inputs, before = layer_in_and_out(model, TOKENS)
    patchattn.patch_model(model, "qk_norm")
    assert patchattn.patch_info(model)["extra_parameters"] == 2 * (HEADS + KV_HEADS)
    torch.testing.assert_close(
        torch.tensor(layer_in_and_out(model, TOKENS)[1]), torch.tensor(before), rtol=0, atol=1e-12
    )
    module = model.model.layers[0].self_attn
    torch.testing.assert_close(torch.tensor(before[0]), torch.tensor(attend(module, inputs[0])), rtol=0, atol=1e-6)
    parameters = variant_parameters(model)
    optimizer = torch.optim.SGD(parameters.values(), lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        (model(TOKENS).logits * torch.linspace(-1, 1, 50)).sum().backward()
        moved = {name: bool((tensor.grad.abs() > 0).all()) for name, tensor in parameters.items()}
        assert moved == {name: step == 1 or name.endswith("exponent") for name in parameters}
        optimizer.step()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_llama_with_the_weights_of_qwen3_gives_what_it_gives(implementation: str) -> None:
    """Where the weights of its norms are the same in all channels, that is."""
    torch.manual_seed(0)
    native = tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES, attn_implementation=implementation)).double().eval()
    with torch.no_grad():
        for name, parameter in native.named_parameters():
            parameter.normal_(std=0.3)
            if "q_norm" in name or "k_norm" in name:
                parameter.fill_(1.7 if "q_norm" in name else 0.6)
    config = tf.LlamaConfig(**SIZES, rms_norm_eps=native.config.rms_norm_eps, attn_implementation=implementation)
    sibling = tf.LlamaForCausalLM(config).double().eval()
    found = sibling.load_state_dict(native.state_dict(), strict=False)
    assert not found.missing_keys
    without = outputs(sibling, input_ids=TOKENS)[0]
    patchattn.patch_model(sibling, "qk_norm", exponent=1.0, learned=False)
    with torch.no_grad():
        for name, parameter in variant_parameters(sibling).items():
            parameter.fill_(1.7 if name.endswith("query_norm") else 0.6)
    got, want = (outputs(model, input_ids=TOKENS)[0] for model in (sibling, native))
    assert float((without - want).abs().max()) > 1e-2
    torch.testing.assert_close(got, want, rtol=5e-6, atol=2e-5)  # norms there are float32 inside


def test_keys_are_stored_as_they_are_read() -> None:
    model = patchattn.patch_model(tiny_llama(), "qk_norm", exponent=1.0, initial_norm=2.0)
    want = outputs(model, input_ids=TOKENS)[0]
    cache, got = None, []
    with torch.no_grad():
        for at in range(TOKENS.shape[1]):
            given = model(TOKENS[:, at : at + 1], past_key_values=cache, use_cache=True)
            cache = given.past_key_values
            got.append(given.logits)
    torch.testing.assert_close(torch.cat(got, dim=1), want, rtol=0, atol=1e-9)
    keys = cache.layers[0].keys
    torch.testing.assert_close(keys.square().mean(-1), torch.full_like(keys[..., 0], 4.0), rtol=1e-4, atol=0)


def test_large_logits_are_bounded() -> None:
    """At exponent 1 no logit is above the product of both norms and the root of the width."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(1000)
    seen: list[Any] = []
    patchattn.patch_model(model, "qk_norm", exponent=1.0)
    with torch.no_grad(), patchattn.probed(model, lambda call, output: seen.append(call), at="base"):
        model(TOKENS)
    keys = seen[0].key.repeat_interleave(HEADS // KV_HEADS, dim=1)
    assert float((seen[0].query @ keys.mT * seen[0].scaling).abs().max()) <= 8**0.5 * (1 + 1e-9)
