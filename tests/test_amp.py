"""AMP's rule (arXiv 2504.21174) as its authors released it, written out in float64 on what hooks see of each prompt."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import patchattn
from patchattn import head_importance
from patchattn.variants.pruning.flap import flap_statistics

from .families import FAMILIES
from .test_flap import RANKED, config_of, matrix, projections, removed_by
from .test_importance import inputs_of, padded

Prompts = list[dict[str, torch.Tensor]]


def prompts() -> Prompts:
    """Of very different lengths, and of different tokens, so that long ones outweigh in a mean over tokens."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for length, low, high in ((3, 3, 20), (4, 3, 20), (30, 40, 64)):
        tokens = torch.randint(low, high, (1, length), generator=generator)
        found.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
    return found


def wide_llama(heads: int = 32, mlp: int = 88, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 64, "max_position_embeddings": 64, **config}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=heads, intermediate_size=mlp, **sizes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.dim() > 1 else 1.0)
    return model


def head_norms(x: np.ndarray, weight: np.ndarray, heads: int) -> np.ndarray:
    """`(T, H)`: l1 norm of what each head adds at each token, from `(T, H * D)` inputs and `(E, H * D)` weights."""
    width = weight.shape[1] // heads
    return np.stack(
        [
            [
                np.abs(weight[:, h * width : (h + 1) * width] @ row[h * width : (h + 1) * width]).sum()
                for h in range(heads)
            ]
            for row in x
        ]
    )


def scores_by_hand(model: nn.Module, data: Prompts, heads: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Of heads and of channels, by attention module: the mean over prompts of each prompt's mean over tokens."""
    of_heads, of_channels = {}, {}
    for site, (output, reader) in projections(model).items():
        weight = matrix(model, output)
        each = [inputs_of(model, output, [prompt]) for prompt in data]
        of_heads[site] = np.mean([head_norms(x, weight, heads).mean(0) for x in each], axis=0)
        each = [inputs_of(model, str(reader), [prompt]) for prompt in data]
        of_channels[site] = np.mean([np.abs(x).mean(0) for x in each], axis=0)
    return of_heads, of_channels


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_every_prompt_counts_the_same(family: str) -> None:
    model, data = FAMILIES[family].make_exact(), prompts()
    of_heads, of_channels = scores_by_hand(model, data, 4)
    for batches in (data, [padded(data[:2]), data[2]], [padded(data)], [padded(data, left=family == "llama")]):
        found = flap_statistics(model, batches, amp=True)
        alone = head_importance(model, batches, "amp", normalise=False).scores
        for site, (_, reader) in projections(model).items():
            np.testing.assert_allclose(found.head_norms[site], of_heads[site], rtol=1e-6)
            np.testing.assert_allclose(alone[site], of_heads[site], rtol=1e-6)
            np.testing.assert_allclose(found.channels[str(reader)].mean_abs, of_channels[site], rtol=1e-6)


def released_counts(heads: int, channels: int, share: float) -> tuple[int, int]:
    """Heads and channels that the released code takes out of a layer: Python's rounding, half to even."""
    gone = min(round(share * heads), heads - 1)
    made_up = share * heads - gone  # of heads, counted as channels
    return gone, min(max(round(share * channels + made_up), 0), channels - 1)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.3, 0.45, 0.7])
def test_the_released_rule_on_a_model_with_a_head_per_query(share: float) -> None:
    model, data = wide_llama(), prompts()
    layers = [p.numel() for name, p in model.named_parameters() if "self_attn" in name or "mlp" in name]
    total = sum(p.numel() for p in model.parameters())
    sparsity = share * sum(layers) / total
    of_heads, of_channels = scores_by_hand(model, data, 32)
    statistics = flap_statistics(model, data, amp=True)
    gone, channels_gone = released_counts(32, 88, sparsity * total / sum(layers))
    assert share != 0.3 or gone == 10  # 0.3 * 32 is 9.6
    patchattn.patch_model(model, "flap", preset="amp", statistics=statistics, sparsity=sparsity)
    config = config_of(model)
    for site in of_heads:
        assert (config["heads"] or {}).get(site, []) == sorted(of_heads[site].argsort()[:gone].tolist())
        assert removed_by(config["kept_channels"][site]) == sorted(of_channels[site].argsort()[:channels_gone].tolist())
    assert model.model.layers[0].mlp.down_proj.bias is None  # no compensation


def test_the_order_is_not_that_of_a_mean_over_tokens() -> None:
    """What the rule decides: with a mean over all tokens, long prompts would choose the heads."""
    model, data = wide_llama(), prompts()
    of_heads, _ = scores_by_hand(model, data, 32)
    for site, (output, _) in projections(model).items():
        over_tokens = head_norms(inputs_of(model, output, data), matrix(model, output), 32).mean(0)
        assert set(over_tokens.argsort()[:10]) != set(of_heads[site].argsort()[:10])


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "phi3"])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_the_released_rule_in_other_families(family: str, share: float) -> None:
    """Query heads of a kv head are one unit; where projections have biases, these are parameters, too."""
    model, data = FAMILIES[family].make_exact(), prompts()
    kv_heads, _ = RANKED[family]
    group = 4 // kv_heads
    of_heads, of_channels = scores_by_hand(model, data, 4)
    inside = {
        "llama": ("_proj",),
        "phi3": ("_proj",),
        "gpt2": ("c_attn", "c_proj", "c_fc"),
        "bert": ("query", "key", "value", "dense"),
    }[family]
    named = [n for n in dict(model.named_parameters()) if any(f"{part}." in n for part in inside)]
    named = [n for n in named if any(f".{layers}." in f".{n}" for layers in ("layers", "h", "layer"))]
    held = sum(model.get_parameter(name).numel() for name in named)
    total = sum(p.numel() for p in model.parameters())
    statistics = flap_statistics(model, data, amp=True)
    patchattn.patch_model(model, "flap", preset="amp", statistics=statistics, sparsity=share * held / total)
    config = config_of(model)
    for site in of_heads:
        gone, channels_gone = released_counts(kv_heads, len(of_channels[site]), share)
        order = of_heads[site].reshape(kv_heads, -1).mean(1).argsort()[:gone]
        assert (config["heads"] or {}).get(site, []) == sorted(g * group + h for g in order for h in range(group))
        assert removed_by(config["kept_channels"][site]) == sorted(of_channels[site].argsort()[:channels_gone].tolist())


def test_heads_alone() -> None:
    """The share is of what can be taken out: with heads alone, more of them make up the same part of the model."""
    model, data = wide_llama(), prompts()
    attention = sum(p.numel() for name, p in model.named_parameters() if "self_attn" in name)
    total = sum(p.numel() for p in model.parameters())
    statistics = flap_statistics(model, data, mlp=False, amp=True)
    patchattn.patch_model(model, "flap", preset="amp", statistics=statistics, sparsity=0.1, mlp=False)
    config = config_of(model)
    assert config["kept_channels"] is None
    assert [len(heads) for heads in config["heads"].values()] == 2 * [round(0.1 * total / attention * 32)]


def test_more_than_the_layers_hold_is_refused() -> None:
    model, data = wide_llama(vocab_size=4096), prompts()
    statistics = flap_statistics(model, data, amp=True)
    with pytest.raises(ValueError, match=r"sparsity=0\.9 of the .* parameters of the model .* hold"):
        patchattn.patch_model(model, "flap", preset="amp", statistics=statistics, sparsity=0.9)
    assert not hasattr(model.config, "patchattn")
