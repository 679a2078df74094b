"""Slots with values on modules whose values are of another width than their keys (DeepSeek's latent attention)."""

from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import patchattn


@pytest.mark.parametrize("variant", ["attention_bias", "meta_tokens"])
def test_values_of_another_width_are_refused_by_name(variant: str) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
    dims = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
    model: Any = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **heads, **dims, first_k_dense_replace=1)).eval()
    patchattn.patch_model(model, variant)
    with pytest.raises(NotImplementedError, match=r"made for values of 12 channels, and those of .* have 6: leave it"):
        model(torch.arange(6)[None])
