"""SSA against its formula (arXiv 2411.12892), computed independently in numpy."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache

import patchattn
from patchattn.core.kv_caches import cache_argument

from .behaviour import randomise, variant_parameters
from .families import FAMILIES, outputs
from .reference import attend, layer_in_and_out, tiny_llama

TOKENS = torch.tensor([[3, 7, 1, 9, 22, 5, 13]])
STREAMS = ("query", "key", "value")
SQUASHES = {"sigmoid": lambda a: 1 / (1 + np.exp(-a)), "exp_neg_exp": lambda a: np.exp(-np.exp(a)), "none": lambda a: a}


def switches() -> list[dict[str, Any]]:
    """Every combination of streams, of the two parts, and of what the token part reads."""
    found = []
    for streams in itertools.product([True, False], repeat=3):
        for token, position in ((True, True), (True, False), (False, True)):
            for features in ("input", "projection") if token else ("input",):
                parts = {"token_aware": token, "position_aware": position, "features": features}
                found.append({**dict(zip(STREAMS, streams, strict=True)), **parts})
    return [one for one in found if any(one[stream] for stream in STREAMS)]


def spelt(settings: dict[str, Any]) -> str:
    on = [name for name, value in settings.items() if value is True]
    return "-".join([*on, *(str(value) for value in settings.values() if not isinstance(value, bool))])


def patched_llama(settings: dict[str, Any], **extra: Any) -> torch.nn.Module:
    model = patchattn.patch_model(tiny_llama(**extra), "ssa", **settings)
    randomise(model)
    return model


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.array([math.erf(value / math.sqrt(2)) for value in x]))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"key": True},
        {"query": False},
        {"value": False, "token_aware": False},
        {"key": True, "position_aware": False},
        {"key": True, "features": "projection"},
        {"key": True, "squash": "exp_neg_exp"},
        {"squash": "none"},
    ],
    ids=spelt,
)
def test_temperatures_follow_the_formula(settings: dict[str, Any]) -> None:
    model = patched_llama(settings)
    module = model.model.layers[0].self_attn
    weights = {name: p.detach().numpy() for name, p in module.patchattn.ssa.named_parameters()}
    projections = {stream: getattr(module, f"{stream[0]}_proj").weight.detach().numpy() for stream in STREAMS}
    streams = {"query": True, "key": False, "value": True, **settings}
    squash = SQUASHES[settings.get("squash", "sigmoid")]

    def scale(stream: str, x: np.ndarray, n: int) -> float:
        if not streams[stream]:
            return 1.0
        tau = 1.0
        if settings.get("token_aware", True):
            projected = settings.get("features") == "projection"
            tau += np.tanh(weights[f"{stream}_token"] @ (gelu(projections[stream] @ x) if projected else x))
        if settings.get("position_aware", True):
            tau += squash(weights[f"{stream}_alpha"][0]) * np.log(n)
        return tau

    inputs, got = layer_in_and_out(model, TOKENS)
    want = attend(module, inputs[0], scale=scale)
    np.testing.assert_allclose(got[0], want, rtol=1e-5, atol=1e-7)  # transformers' rotary angles are float32


@pytest.mark.parametrize("settings", switches(), ids=spelt)
def test_every_combination_decodes_pads_and_packs_like_one_forward(settings: dict[str, Any]) -> None:
    model = patched_llama(settings, num_hidden_layers=2)
    full = outputs(model, input_ids=TOKENS)[0]
    with patchattn.unpatched(model):
        assert float((outputs(model, input_ids=TOKENS)[0] - full).abs().max()) > 1e-4
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=10)):
        chunks = TOKENS.split([3, 1, 2, 1], dim=1)
        parts = [outputs(model, input_ids=chunk, **cache_argument(model, cache))[0] for chunk in chunks]
        torch.testing.assert_close(torch.cat(parts, dim=1), full)

    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), TOKENS], dim=1)
    mask = (torch.arange(10) > 2).long()[None]
    numbers = (mask.cumsum(-1) - 1).clamp(min=0)
    together = outputs(model, input_ids=padded, attention_mask=mask, position_ids=numbers)[0]
    torch.testing.assert_close(together[:, 3:], full)
    cache = DynamicCache(config=model.config)
    parts = [
        outputs(
            model,
            input_ids=padded[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=numbers[:, start:end],
            **cache_argument(model, cache),
        )[0]
        for start, end in ((0, 5), (5, 6), (6, 10))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1)[:, 3:], full)

    packed, numbers = torch.cat([TOKENS[:, :4], TOKENS], dim=1), torch.tensor([[*range(4), *range(7)]])
    together = outputs(model, input_ids=packed, position_ids=numbers, use_cache=False)[0]
    torch.testing.assert_close(together[:, :4], full[:, :4])
    torch.testing.assert_close(together[:, 4:], full)


@pytest.mark.parametrize("features", ["input", "projection"])
@pytest.mark.parametrize("squash", list(SQUASHES))
def test_near_identity_at_the_start_with_gradients_for_every_parameter(features: str, squash: str) -> None:
    model = tiny_llama()
    before = outputs(model, input_ids=TOKENS)[0]
    patchattn.patch_model(model, "ssa", key=True, features=features, squash=squash)
    logits = model(TOKENS).logits
    # the coefficient, at most 0.0009, times log 7 is all that is left of the start
    torch.testing.assert_close(logits, before, rtol=0.05, atol=0.05)
    (logits * torch.randn_like(logits)).sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in variant_parameters(model).values())


@pytest.mark.parametrize(
    ("preset", "coefficient"),
    [("released", math.exp(-math.exp(2.0))), ("released_gpt2", math.exp(-math.exp(1.5))), ("released_linear", 1e-5)],
)
def test_presets_are_the_position_only_form_of_the_released_code(preset: str, coefficient: float) -> None:
    model = patchattn.patch_model(tiny_llama(), "ssa", preset=preset)
    assert patchattn.patch_info(model)["extra_parameters"] == 1
    seen: list[patchattn.Observation] = []
    with patchattn.observe(model, seen.append):
        model(TOKENS)
    (observation,) = seen
    want = 1 + coefficient * torch.arange(1, 8).double().log()
    torch.testing.assert_close(observation.values["query_temperature"], want[None], rtol=0, atol=1e-8)


def test_only_the_position_weights_learn_fast() -> None:
    variant = patched_llama({"key": True}).model.layers[0].self_attn.patchattn.ssa
    fast = variant.fast_parameters()
    assert [id(p) for p in fast] == [id(getattr(variant, f"{stream}_alpha")) for stream in STREAMS]


def test_observers_see_every_stream_and_what_attention_gets() -> None:
    model = patched_llama({"key": True})
    seen: dict[str, patchattn.Observation] = {}
    with patchattn.observe(model, lambda observation: seen.update(dict.fromkeys(observation.values, observation))):
        model(TOKENS)
    assert set(seen) == {f"{stream}_temperature" for stream in STREAMS}
    with patchattn.unpatched(model):
        module, plain = model.model.layers[0].self_attn, {}
        handle = module.q_proj.register_forward_hook(lambda _module, _args, output: plain.update(query=output))
        outputs(model, input_ids=TOKENS)
        handle.remove()
    given = seen["query_temperature"]
    got = given.source.query.norm(dim=-1)  # a rotation keeps norms
    want = (
        plain["query"].view(1, 7, 4, -1).transpose(1, 2).norm(dim=-1) * given.values["query_temperature"].abs()[:, None]
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_keys_are_scaled_behind_their_norm() -> None:
    """A factor on the key projection would be cancelled by Qwen3's key norm."""
    model, inputs = FAMILIES["qwen3"].make(), FAMILIES["qwen3"].inputs()
    before = outputs(model, **inputs)[0]
    patchattn.patch_model(model, "ssa", query=False, key=True, value=False, position_aware=False)
    randomise(model)
    assert float((outputs(model, **inputs)[0] - before).abs().max()) > 1e-2


def test_what_the_cache_holds_is_scaled_once() -> None:
    model = patchattn.patch_model(tiny_llama(), "ssa", query=False, token_aware=False, initial_alpha=0.0)
    plain, scaled = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for start in range(0, 7, 2):
        outputs(model, input_ids=TOKENS[:, start : start + 2], **cache_argument(model, scaled))
    with patchattn.unpatched(model):
        outputs(model, input_ids=TOKENS, **cache_argument(model, plain))
    factor = 1 + 0.5 * torch.arange(1, 8).double().log()
    torch.testing.assert_close(scaled.layers[0].values, plain.layers[0].values * factor[:, None])
    torch.testing.assert_close(scaled.layers[0].keys, plain.layers[0].keys)


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Of the first layer with each parameter."""
    found: dict[str, tuple[int, ...]] = {}
    for name, parameter in variant_parameters(model).items():
        found.setdefault(name.rsplit(".", 1)[1], tuple(parameter.shape))
    return found


def test_shared_features_have_the_width_of_their_projection() -> None:
    token = {"features": "projection", "key": True, "position_aware": False}
    llama = shapes(patchattn.patch_model(FAMILIES["llama"].make(), "ssa", **token))
    assert llama == {"query_token": (32,), "key_token": (16,), "value_token": (16,)}  # 4 heads of 8, 2 kv heads
    fused = shapes(patchattn.patch_model(FAMILIES["gpt2"].make(), "ssa", **token))
    assert fused == dict.fromkeys(llama, (96,))


def test_shared_features_go_through_lora() -> None:
    model = patched_llama({"features": "projection"})
    before = outputs(model, input_ids=TOKENS)[0]
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    module = tuned.base_model.model.model.layers[0].self_attn
    tokens = torch.randn(1, 3, 32, dtype=torch.float64)
    features = module.patchattn.ssa.features("query", module, tokens)
    torch.testing.assert_close(features, torch.nn.functional.gelu(module.q_proj(tokens)))
    assert not torch.allclose(features, torch.nn.functional.gelu(module.q_proj.base_layer(tokens)))
    assert not torch.allclose(outputs(tuned, input_ids=TOKENS)[0], before)


def test_cross_attention_reads_the_other_sequence() -> None:
    model, inputs = FAMILIES["t5"].make_exact(), FAMILIES["t5"].inputs()
    patchattn.patch_model(model, "ssa", features="projection", key=True, modules="EncDecAttention")
    randomise(model)
    seen: list[patchattn.Observation] = []
    with patchattn.observe(model, seen.append):
        result = model(**inputs)
    module = model.decoder.block[0].layer[1].EncDecAttention
    variant = module.patchattn.ssa
    memory = result.encoder_last_hidden_state
    for stream, child in (("key", module.k), ("value", module.v)):
        first = next(one.values[f"{stream}_temperature"] for one in seen if f"{stream}_temperature" in one.values)
        token, alpha = (getattr(variant, f"{stream}_{part}") for part in ("token", "alpha"))
        projected = memory @ child.weight.T
        features = 0.5 * projected * (1 + torch.erf(projected / math.sqrt(2)))
        want = 1 + torch.tanh(features @ token) + math.log(memory.shape[1]) / (1 + torch.exp(-alpha))
        torch.testing.assert_close(first, want.detach())


def deepseek() -> torch.nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 1}
    low_rank = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "first_k_dense_replace": 1, "vocab_size": 64}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **low_rank, **heads)).eval()


def gpt2_with_cross_attention() -> torch.nn.Module:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, add_cross_attention=True)).eval()


@pytest.mark.parametrize(
    ("build", "module"),
    [(deepseek, r"DeepseekV3Attention \(model.layers.0.self_attn\)"), (gpt2_with_cross_attention, "crossattention")],
)
def test_shared_features_need_a_projection_of_the_input(build: Any, module: str) -> None:
    """Multi-head latent attention makes queries from a latent; GPT-2's cross attention fuses only keys and values."""
    model = build()
    with pytest.raises(NotImplementedError, match=rf'{module}.* query .*set features="input"'):
        patchattn.patch_model(model, "ssa", features="projection")
    assert not variant_parameters(model)
    patchattn.patch_model(model, "ssa", modules="self_attn|attn")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"query": False, "value": False}, "scales nothing"),
        ({"token_aware": False, "position_aware": False}, "no temperature left"),
        ({"query": 1}, "query must be bool"),
        ({"initial_alpha": float("nan")}, "initial_alpha must be a number that float32 holds"),
        ({"squash": "exp_neg_exp", "initial_alpha": 6.0}, "start at most at 4"),
        ({"squash": "exp"}, "squash must be"),
        ({"features": "projections"}, "features must be"),
        ({"preset": "releasd"}, "did you mean 'released'"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        patchattn.patch_model(tiny_llama(), "ssa", **settings)
