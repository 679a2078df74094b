"""Attention modules that do not tell the width of their input (XLNet, Funnel) or have no configuration (BLOOM, MPT)."""

from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import patchattn
from patchattn.core.patching import is_patched

from .behaviour import variant_parameters

TOKENS = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(1))
LEARNED: list[tuple[str, dict[str, Any]]] = [
    ("ssa", {"query": True, "key": False, "value": False}),
    ("moh", {"router": "learned"}),
    ("gated", {}),
]


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64}
    if name == "xlnet":
        return tf.XLNetLMHeadModel(tf.XLNetConfig(**sizes, d_model=32, n_layer=2, n_head=4, d_inner=48)).eval()
    if name == "funnel":
        layers = {"block_sizes": [1, 1], "num_decoder_layers": 1}
        return tf.FunnelModel(tf.FunnelConfig(**sizes, **layers, d_model=32, n_head=4, d_head=8, d_inner=48)).eval()
    if name == "bloom":
        return tf.BloomForCausalLM(tf.BloomConfig(**sizes, hidden_size=32, n_layer=2, n_head=4)).eval()
    return tf.MptForCausalLM(tf.MptConfig(**sizes, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)).eval()


@pytest.mark.parametrize("family", ["xlnet", "funnel"])
def test_a_width_that_is_not_told_is_refused_by_name_and_what_needs_none_runs(family: str) -> None:
    model = model_of(family)
    base = model(TOKENS)[0]
    for variant, settings in LEARNED:
        with pytest.raises(NotImplementedError, match=r"cannot tell the input width of .*(attn|attention)"):
            patchattn.patch_model(model, variant, **settings)
        assert not is_patched(model)
    for variant, settings in (("ssa", {"token_aware": False, "key": False, "value": False}), ("moh", {})):
        with patchattn.patched(model, variant, **settings):
            assert not torch.equal(model(TOKENS)[0], base)
    assert torch.equal(model(TOKENS)[0], base)


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_modules_without_a_configuration_run_what_is_learned_of_their_input(family: str) -> None:
    model = model_of(family)
    assert all(not hasattr(module, "config") for name, module in model.named_modules() if name.endswith("attn"))
    for variant, settings in LEARNED:
        with patchattn.patched(model, variant, **settings):
            model(TOKENS, use_cache=False)[0].pow(2).mean().backward()
            for name, parameter in variant_parameters(model).items():
                assert parameter.grad is not None, name
                assert parameter.grad.any(), name
    with pytest.raises(ValueError, match=r"cannot tell the length that .* was trained on; give train_length"):
        patchattn.patch_model(model, "logn")
    with patchattn.patched(model, "logn", train_length=4):
        model(TOKENS)
