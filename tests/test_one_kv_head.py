"""Every variant of texts on a model whose query heads all share one kv head."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from .behaviour import Case, accepted, close, decoded, text
from .families import VOCABULARY, outputs

CHUNKS = [7, 1, 3, 1]
OF_TWO = ("differential", "duo")  # as is a budget of 4 and 7 keys


@pytest.mark.parametrize("case", accepted("llama", "attention", "cache", "surgery"), ids=str)
def test_single_tokens_equal_one_forward(case: Case) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=1, head_dim=8)
    model: Any = LlamaForCausalLM(config).double().eval()
    for parameter in model.parameters():
        parameter.data.mul_(3.0 if parameter.dim() > 1 else 1.0)
    if case.variant in OF_TWO or "4, 7" in str(case):
        with pytest.raises((ValueError, NotImplementedError), match=r"kv heads|must keep at least one"):
            case.patch(model)
        return
    case.patch(model)
    tokens = text(12)
    whole, steps = outputs(model, input_ids=tokens)[0], decoded(model, tokens, CHUNKS)
    if case.looks_ahead:
        close(steps[:, :7], outputs(model, input_ids=tokens[:, :7])[0])
    else:
        close(steps, whole)
    close(whole[:1], outputs(model, input_ids=tokens[:1])[0])
