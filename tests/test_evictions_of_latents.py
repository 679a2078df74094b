"""Evictions on modules whose kv cache stores what keys are made of (DeepSeek's latents), of one head for all."""

from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import patchattn

SIZES = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}


def generated(name: str, **settings: Any) -> torch.Tensor:
    torch.manual_seed(0)
    config = DeepseekV3Config(
        **SIZES, **LATENT, num_attention_heads=4, num_key_value_heads=4, first_k_dense_replace=1, pad_token_id=0
    )
    model: Any = DeepseekV3ForCausalLM(config).eval()
    patchattn.patch_model(model, name, settings)
    return model.generate(torch.arange(3, 15)[None], max_new_tokens=4, do_sample=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["snapkv", "adakv", "knorm", "keydiff", "h2o"])
def test_a_choice_by_kv_head_is_refused_by_name(name: str) -> None:
    with pytest.raises(NotImplementedError, match=r"chooses by kv heads .* has 4 where its kv cache stores 1"):
        generated(name, budget=5)


def test_channels_of_keys_are_refused_by_name() -> None:
    with pytest.raises(NotImplementedError, match=r"think.* has \(4, 12\) where its kv cache stores \(1, 16\)"):
        generated("think", ratio=0.5, recent=3, window=4)


def test_a_choice_of_tokens_drops_their_latents() -> None:
    assert generated("streaming_llm", sinks=1, recent=4).shape == (1, 16)
    assert generated("tova", budget=5).shape == (1, 16)
