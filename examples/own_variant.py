"""A variant of your own, a fixed softmax temperature, in about twenty lines, checked like the shipped ones."""

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import patchattn


@dataclass(frozen=True, kw_only=True)
class TemperatureConfig(patchattn.VariantConfig):
    temperature: float = patchattn.option(
        0.8, help="Divides the logits: below 1 attention is sharper.", source="ours", minimum=0.01
    )


class Temperature(patchattn.Variant):
    """Attention whose logits are divided by one number: queries are, which comes to the same."""

    config_class = TemperatureConfig

    def attend(self, call: patchattn.AttentionCall, inner: patchattn.Attend) -> patchattn.AttentionOutput:
        return inner(call.replace(query=call.query / self.config.temperature))

    @classmethod
    def neutral_config(cls) -> dict[str, float]:
        return {"temperature": 1.0}


patchattn.register_variant(
    patchattn.VariantInfo(
        name="example_temperature",
        variant=Temperature,
        title="A fixed softmax temperature",
        arxiv_id=None,
        year=2026,
        summary="Sharper or softer attention.",
        extra_parameters="none",
        needs_training=False,
    )
)

if __name__ == "__main__":
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=256)).eval()
    patchattn.patch_model(model, "example_temperature", temperature=0.5)
    print(patchattn.check_patch(model, torch.randint(3, 256, (2, 24))))
