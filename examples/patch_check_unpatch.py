"""Patch a model, see what changed, check it, take the patch off again. Runs in seconds, without a network."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import patchattn

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=256,
)
model = LlamaForCausalLM(config).eval()
inputs = {"input_ids": torch.randint(3, 256, (2, 24))}

with torch.no_grad():
    before = model(**inputs).logits
    patchattn.patch_model(model, "moh", active_ratio=0.5)
    used: dict[int, torch.Tensor] = {}
    with patchattn.observe(model, lambda seen: used.update({seen.site.layer_index: seen.values["gate"].mean((0, 1))})):
        after = model(**inputs).logits

for layer, share in used.items():
    print(f"layer {layer}: share of tokens that use each head", [round(float(x), 2) for x in share])
print(f"largest change of a logit: {(after - before).abs().max():.3f}")
print(patchattn.check_patch(model, inputs))

patchattn.unpatch_model(model)
with torch.no_grad():
    print("restored to the last bit:", torch.equal(model(**inputs).logits, before))
